"""What recomputes each saved value from the others, and which ones must not run twice."""

from __future__ import annotations

from collections.abc import Collection

import torch.fx as fx

from memo_compile.passes.analysis.bit_sensitive import any_decides
from memo_compile.passes.fx.facts import is_pure, schema_name
from memo_compile.passes.fx.meta import TOKENS, UNCHECKED
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

    Returns None where the chain meets a node that must not run twice: random numbers, mutations, collectives other than
    gathers of parameters.
    """
    chain: dict[fx.Node, None] = {}
    stack = [value]
    while stack:
        node = stack.pop()
        if node in chain or (node in available and node is not value):
            continue
        if not is_pure(node) and not _gathers_parameters(node):
            return None
        chain[node] = None
        stack.extend(node.all_input_nodes)
    position = {n: i for i, n in enumerate(value.graph.nodes)}
    return sorted(chain, key=position.__getitem__)


def _gathers_parameters(node: fx.Node) -> bool:
    """A gather among ranks of what has no tokens, or the wait for one.

    To gather again is the point of sharding parameters. All ranks do it, since they carry out one plan
    (`trace/ranks.py`). Of activations a slice cannot be gathered alone.
    """
    if schema_name(node) == "_c10d_functional::wait_tensor":
        return _gathers_parameters(node.all_input_nodes[0])
    gathers = schema_name(node) == "_c10d_functional::all_gather_into_tensor"
    return gathers and not any(TOKENS in n.meta for n in (node, *node.all_input_nodes))
