"""Saved activations that the backward may write over: Inductor is told, and AOTAutograd is not.

AOTAutograd would refuse to keep a graph for a second backward, which memo provides for itself.

Inductor compiles a region or a branch with the same list, whose indices then mean other inputs: those of the region,
which its caller may go on to read. So regions are given none.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `TracingContext.fw_metadata.bw_donated_idxs`, and
`torch._inductor.graph.GraphLowering.make_subgraph`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


def nothing_donated() -> None:
    """Call this while the forward is compiled, with torch's own donation turned off."""
    from torch._guards import TracingContext  # loads torch

    metadata: Any = TracingContext.get().fw_metadata
    metadata.bw_donated_idxs = []


@contextlib.contextmanager
def donating(indices: list[int]) -> Iterator[None]:
    """Within, Inductor may write in place over these inputs of the backward, and over none of a region's."""
    from torch._inductor.graph import GraphLowering  # loads Inductor

    lowering: Any = GraphLowering
    original = lowering.make_subgraph

    def make_subgraph(self: Any, *args: Any, **keywords: Any) -> Any:
        with _told([]):
            return original(self, *args, **keywords)

    lowering.make_subgraph = make_subgraph
    try:
        with _told(indices):
            yield
    finally:
        lowering.make_subgraph = original


@contextlib.contextmanager
def _told(indices: list[int]) -> Iterator[None]:
    from torch._guards import TracingContext  # loads torch

    context: Any = TracingContext.get()
    before = context.fw_metadata
    # In a dry run, before AOTAutograd has stored its own, nothing else of it is read.
    context.fw_metadata = copy.copy(before) if before is not None else SimpleNamespace()
    context.fw_metadata.bw_donated_idxs = indices
    try:
        yield
    finally:
        context.fw_metadata = before
