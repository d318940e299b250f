"""The two sides of a layout: one arena holds buffers of the forward and of the backward, which may share names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from memo_compile.schema import ArenaBuffer

Side = Literal["fw", "bw"]
FORWARD: Side = "fw"
BACKWARD: Side = "bw"


def named(side: Side, name: str) -> str:
    """The name in the arena of a buffer of one graph.

    >>> named(FORWARD, "buf0")
    'fw:buf0'
    """
    return f"{side}:{name}"


def side_of(name: str) -> Side:
    """Which graph a buffer of the arena is of."""
    return FORWARD if name.startswith(f"{FORWARD}:") else BACKWARD


def buffers_of(side: Side, buffers: Iterable[ArenaBuffer]) -> list[ArenaBuffer]:
    """The buffers of one graph."""
    return [b for b in buffers if side_of(b.name) == side]
