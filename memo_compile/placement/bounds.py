"""Live bytes over the timeline, and the lower bound: the largest sum of them."""

from __future__ import annotations

from collections.abc import Sequence

from memo_compile.placement.problem import Buffer, aligned


def lower_bound(buffers: Sequence[Buffer], alignment: int = 1) -> int:
    """The largest sum of live bytes. No placement can be smaller.

    >>> lower_bound([Buffer("a", 4, 0, 2), Buffer("b", 2, 1, 3), Buffer("c", 3, 2, 4)])
    6
    """
    return worst_moment(buffers, alignment)[1]


def worst_moment(buffers: Sequence[Buffer], alignment: int = 1) -> tuple[int, int]:
    """The first step at which the most bytes are live, and those bytes. (0, 0) where there is nothing."""
    change: dict[int, int] = {}
    for b in buffers:
        size = aligned(b.size, alignment)
        change[b.start] = change.get(b.start, 0) + size
        change[b.end] = change.get(b.end, 0) - size
    step, best, live = 0, 0, 0
    for t in sorted(change):
        live += change[t]
        if live > best:
            step, best = t, live
    return step, best


def live_bytes(ranges: Sequence[tuple[int, int, int]], steps: int) -> list[int]:
    """Sum of bytes over time for (start, end, bytes) triples, one number for each step."""
    change = [0] * (steps + 1)
    for start, end, size in ranges:
        if end > start:
            change[start] += size
            change[min(end, steps)] -= size
    total, out = 0, []
    for step in range(steps):
        total += change[step]
        out.append(total)
    return out
