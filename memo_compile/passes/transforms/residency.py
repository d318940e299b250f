"""Where the rows of a saved activation are until the backward, and where on the host those lie that leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.fx.sizes import elements
from memo_compile.passes.transforms.partition import (
    Split,
)
from memo_compile.placement import Buffer, place

HOST_ALIGNMENT = 64  # bytes: a cache line, so that two copies never write to one


@dataclass(frozen=True)
class Residency:
    """Token rows of an activation in each home: [0, offloaded) are offloaded, then come the recomputed, then the kept.

    `axis` is None for a value with one home, whole, and where nobody asks which rows these are.
    """

    kept: int
    offloaded: int
    recomputed: int
    axis: TokenAxis | None = field(default=None, kw_only=True)

    @property
    def tokens(self) -> int:
        """All token rows; 1 for a value that cannot be sliced."""
        return self.kept + self.offloaded + self.recomputed

    @property
    def whole(self) -> bool:
        """Whether all rows have the same home."""
        return self.tokens in (self.kept, self.offloaded, self.recomputed)


@dataclass(frozen=True)
class Transfer:
    """One slice that goes to the host and back: its bytes in the host lease, and the saved value it is part of."""

    value: str
    offset: int
    bytes: int


def host_layout(split: Split, residency: Mapping[str, Residency]) -> tuple[tuple[Transfer, ...], int]:
    """Host offsets, and the bytes of the lease.

    A slice lies on the host from its offload in the forward to its prefetch in the backward. So all of them are there
    at the border of the two, none can lie where another has lain, and their sum is the least that there can be.
    """
    nodes = list(split.forward.graph.nodes)
    slices: list[Buffer] = []
    for step, node in enumerate(nodes):
        plan = residency.get(node.name)
        if plan is not None and plan.offloaded and node.name in split.saved:
            value: torch.Tensor = node.meta["val"]
            size = elements(value.shape) * value.element_size() * plan.offloaded // plan.tokens
            slices.append(Buffer(node.name, size, step, len(nodes) + 1))
    placement = place(slices, alignment=HOST_ALIGNMENT)
    return tuple(Transfer(s.name, placement.offsets[s.name], s.size) for s in slices), placement.peak
