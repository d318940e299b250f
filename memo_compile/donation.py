"""What AOTAutograd gets to know of saved activations that the backward may write over: nothing.

It would refuse to keep a graph for a second backward, which memo provides for itself.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `TracingContext.fw_metadata.bw_donated_idxs`.
"""

from __future__ import annotations

from typing import Any


def nothing_donated() -> None:
    """Call this while the forward is compiled, with torch's own donation turned off."""
    from torch._guards import TracingContext

    metadata: Any = TracingContext.get().fw_metadata
    metadata.bw_donated_idxs = []
