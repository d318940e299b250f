"""Notes on each node that a pass inserts why it is there; dumps and explanations read it, nothing else does.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: the hooks that an `fx.GraphModule` calls for each
node created in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.fx as fx

from memo_compile.passes.fx.meta import FOR, ROLE, WHY, Role


@contextlib.contextmanager
def provenance(gm: fx.GraphModule, why: str, value: str = "", role: Role | None = None) -> Iterator[None]:
    """Within, nodes created in `gm` get `meta["memo_why"] = why`, and serve the saved activation `value` as `role`."""
    created: list[fx.Node] = []
    gm._register_create_node_hook(created.append)
    try:
        yield
    finally:
        gm._unregister_create_node_hook(created.append)
        for node in created:
            if value:
                node.meta.setdefault(FOR, value)
            node.meta.setdefault(WHY, why)  # the innermost reason holds
            if role is not None:
                node.meta.setdefault(ROLE, role)
