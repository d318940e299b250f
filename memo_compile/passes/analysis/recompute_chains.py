"""What recomputes each saved value from the others, and which ones must not run twice."""

from __future__ import annotations

from collections.abc import Collection

import torch.fx as fx

from memo_compile.passes.analysis.bit_sensitive import any_decides
from memo_compile.passes.fx.facts import is_pure
from memo_compile.passes.fx.meta import UNCHECKED
from memo_compile.passes.fx.mutations import readable_inputs

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


def recompute_chain(value: fx.Node, available: Collection[fx.Node]) -> list[fx.Node] | None:
    """The nodes that must run again, in graph order and `value` last, to make `value` from what is available.

    Returns None where the chain meets a node that must not run twice: random numbers, collectives, mutations.
    """
    chain: dict[fx.Node, None] = {}
    stack = [value]
    while stack:
        node = stack.pop()
        if node in chain or (node in available and node is not value):
            continue
        if not is_pure(node):
            return None
        chain[node] = None
        stack.extend(node.all_input_nodes)
    position = {n: i for i, n in enumerate(value.graph.nodes)}
    return sorted(chain, key=position.__getitem__)
