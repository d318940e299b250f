"""Buffers of the two sides of a layout: one arena holds those of the forward and of the backward, which share names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memo_compile.placement import Buffer
from memo_compile.schema import ArenaBuffer, Side


def key_of(side: Side, name: str) -> str:
    """What a placement calls a buffer: unique, and read by nobody."""
    return f"{side} {name}"


@dataclass(frozen=True, kw_only=True)
class Sided(Buffer):
    """A buffer to place; `local` is its name in the code of its side, `name` its key."""

    side: Side
    local: str

    @staticmethod
    def of(side: Side, local: str, size: int, start: int, end: int) -> Sided:
        """A buffer of one side, under its key."""
        return Sided(key_of(side, local), size, start, end, side=side, local=local)


def buffers_of(side: Side, buffers: Iterable[ArenaBuffer]) -> list[ArenaBuffer]:
    """The buffers of one graph."""
    return [b for b in buffers if b.side is side]
