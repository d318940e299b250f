"""Saved activations that the backward may write over: Inductor is told, and AOTAutograd is not.

AOTAutograd would refuse to keep a graph for a second backward, which memo provides for itself.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `TracingContext.fw_metadata.bw_donated_idxs`.
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
    """Within, Inductor may write in place over these inputs of the backward."""
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
