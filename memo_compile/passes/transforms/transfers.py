"""What scheduling of offloads and prefetches shares: when nodes begin, and where memory has room.

Costs are estimates, and a copy may have to wait for its thread or its stream. So what memory has room for anyway begins
earlier than the link needs, and is waited for later, by `SLACK` of the graph's time at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.fx as fx

from memo_compile.passes.fx.sizes import elements

SLACK = 0.03  # of a graph's seconds: about a layer of a deep model
# Of the most bytes live: above, there is no room for slack, as what a compiler emits may hold a little more.
FULL = 0.85


def begins_of(nodes: list[fx.Node], seconds: Callable[[fx.Node], float]) -> dict[fx.Node, float]:
    """When each node begins, in seconds from the start of its graph."""
    return dict(zip(nodes, itertools.accumulate([seconds(n) for n in nodes], initial=0.0), strict=False))


class Room:
    """Bytes live at each step. Room is what may be added without coming near the most of them; no steps, no room."""

    def __init__(self, live: Sequence[int], most: int = 0) -> None:
        self.live = list(live)
        self.most = FULL * max(most, *self.live, 0)

    def has(self, size: int, step: int) -> bool:
        return step < len(self.live) and self.live[step] + size <= self.most

    def hold(self, size: int, start: int, end: int) -> None:
        """Count `size` bytes more over steps [start, end)."""
        for step in range(start, min(end, len(self.live))):
            self.live[step] += size


def size_of(node: fx.Node) -> int:
    value: torch.Tensor = node.meta["val"]
    return elements(value.shape) * value.element_size()
