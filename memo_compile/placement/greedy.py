"""Greedy placement: each buffer, in some order, at the lowest offset that is free for all of its life.

A portfolio of orders is tried, and the first to reach the lower bound ends it. On graphs of training steps one of
them nearly always does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence

from memo_compile.placement.problem import Buffer, aligned

Order = Callable[[Buffer], tuple[int, ...]]

ORDERS: dict[str, Order] = {
    "size": lambda b: (-b.size, b.start, b.end),
    "area": lambda b: (-b.size * (b.end - b.start), b.start),
    "life": lambda b: (-(b.end - b.start), -b.size, b.start),
    "start": lambda b: (b.start, -b.size, b.end),
    "end": lambda b: (-b.end, -b.size, b.start),
    "life then start": lambda b: (b.start - b.end, b.start, -b.size),
}


def place_in_order(
    buffers: Sequence[Buffer], order: Order, alignment: int, fixed: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """Offsets and peak of one order: first fit, lowest offset."""
    index = _Overlaps(buffers)
    offsets: dict[str, int] = {}
    for b in buffers:
        if b.name in fixed:
            offsets[b.name] = fixed[b.name]
            index.put(b, fixed[b.name], alignment)
    for b in sorted((b for b in buffers if b.name not in fixed), key=lambda b: (*order(b), b.name)):
        offset = index.lowest_free(b, alignment)
        offsets[b.name] = offset
        index.put(b, offset, alignment)
    peak = max((offsets[b.name] + aligned(b.size, alignment) for b in buffers), default=0)
    return offsets, peak


class _Overlaps:
    """Placed buffers by the stretch of time in which they live, so that few need to be looked at.

    The timeline is divided into stretches; a placed buffer is listed, by offset, in each stretch that it touches.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        starts = sorted({b.start for b in buffers})
        step = max(1, len(starts) // 256)
        self._edges = starts[::step] or [0]
        self._stretches: list[list[tuple[int, int, int, int]]] = [[] for _ in self._edges]

    def _touched(self, b: Buffer) -> range:
        first = max(0, bisect_left(self._edges, b.start + 1) - 1)
        return range(first, max(first + 1, bisect_left(self._edges, b.end)))

    def put(self, b: Buffer, offset: int, alignment: int) -> None:
        for i in self._touched(b):
            insort(self._stretches[i], (offset, offset + aligned(b.size, alignment), b.start, b.end))

    def lowest_free(self, b: Buffer, alignment: int) -> int:
        taken = sorted(
            {
                (low, high)
                for i in self._touched(b)
                for low, high, start, end in self._stretches[i]
                if start < b.end and b.start < end
            }
        )
        size, offset = aligned(b.size, alignment), 0
        for low, high in taken:
            if offset + size <= low:
                break
            offset = max(offset, high)
        return offset
