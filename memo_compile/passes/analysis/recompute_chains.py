"""What recomputes each saved value from the others, and which ones must not run twice."""

from __future__ import annotations

from collections.abc import Collection

import torch.fx as fx

from memo_compile.passes.analysis.bit_sensitive import any_decides
from memo_compile.passes.transforms.partition import UNCHECKED, readable_inputs, recompute_chain

Chains = dict[str, tuple[fx.Node, ...] | None]


def recompute_chains(joint: fx.GraphModule, saved: Collection[fx.Node], exact: frozenset[str]) -> Chains:
    """The nodes that recompute each saved value, by its name; None where it must not be.

    That is also so for values whose last bits matter, `exact` among them. Nothing is recomputed from inputs that a
    user's function keeps by itself: autograd does not see when these are written to.
    """
    chains: Chains = {}
    available = {n for n in {*saved, *readable_inputs(joint)} if UNCHECKED not in n.meta}
    for node in saved:
        once = node.op == "placeholder" or node.name in exact
        chain = None if once else recompute_chain(node, available)
        chains[node.name] = tuple(chain) if chain is not None and not any_decides(chain) else None
    return chains
