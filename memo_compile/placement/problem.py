"""What is placed: buffers with a size and a half-open lifetime; and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memo_compile.errors import InvalidBuffer


@dataclass(frozen=True)
class Buffer:
    """`size` bytes, live over the half-open range of steps [start, end).

    `alias` names a buffer whose offset this one shares. `prefer` is the end of the arena that it would rather lie at:
    "low", "high" or "any".
    """

    name: str
    size: int
    start: int
    end: int
    alias: str | None = None
    prefer: str = "any"


@dataclass(frozen=True)
class Placement:
    """Offsets in bytes by name. `peak` is the end of the highest buffer; no placement is below `lower_bound`.

    `fits` says whether the asked capacity is met: True, False (proved), or None (not known in the time).
    """

    offsets: dict[str, int]
    peak: int
    lower_bound: int
    proved_optimal: bool
    solver: str
    seconds: float
    fits: bool | None = True


def aligned(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def check(buffers: Sequence[Buffer]) -> None:
    """Reject what is no problem.

    Raises:
        InvalidBuffer: a negative size, an empty lifetime, a name given twice, an alias of nothing.
    """
    names: set[str] = set()
    for b in buffers:
        if b.size < 0 or b.end <= b.start:
            raise InvalidBuffer(f"buffer {b.name!r}: size {b.size} and lifetime [{b.start}, {b.end}) are not possible")
        if b.name in names:
            raise InvalidBuffer(f"buffer {b.name!r} is given twice")
        if b.prefer not in ("any", "low", "high"):
            raise InvalidBuffer(f'buffer {b.name!r}: prefer={b.prefer!r} is none of "any", "low", "high"')
        names.add(b.name)
    for b in buffers:
        if b.alias is not None and b.alias not in names:
            raise InvalidBuffer(f"buffer {b.name!r} is an alias of {b.alias!r}, which is not there")
