"""Splits a joint graph into a forward and a backward, for a chosen set of saved activations.

The private parts of torch's partitioner that memo uses are named in `_torch_partitioner`, and nowhere else.
Tried with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from memo_compile.passes.graph import is_cheap, is_pure, is_view, nbytes, storage_of


@dataclass(frozen=True)
class Split:
    """A forward and a backward graph. `saved` names the forward values that the backward receives, in order."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[str, ...]
    num_forward_outputs: int


def _torch_partitioner() -> Any:
    from torch._functorch import partitioners

    return partitioners


def split_min_cut(joint: fx.GraphModule, inputs: Any, num_fwd_outputs: int, static_inputs: list[int] | None) -> Split:
    """torch's own split: what `inductor` would run. The joint graph loses its dead and duplicate nodes on the way."""
    forward, backward = _torch_partitioner().min_cut_rematerialization_partition(
        joint,
        inputs,
        compiler="inductor",
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_indices=static_inputs,
    )
    return Split(forward, backward, _saved_names(forward, num_fwd_outputs), num_fwd_outputs)


def split_saving(joint: fx.GraphModule, saved: Collection[fx.Node], num_fwd_outputs: int) -> Split:
    """Split so that the backward receives `saved` and what it reads of the inputs, and computes what else it needs.

    The order of the backward is left as extracted (recomputation first): `order_backward` comes after the slices.
    """
    partitioners = _torch_partitioner()
    # What the backward does not read of these, torch leaves out again.
    wanted = set(saved) | readable_inputs(joint)
    values = [n for n in joint.graph.nodes if n in wanted]
    symbols = [n for n in values if partitioners.is_sym_node(n)]
    values = [n for n in values if not partitioners.is_sym_node(n)]
    forward, backward = partitioners._extract_fwd_bwd_modules(
        joint, values, saved_sym_nodes=symbols, num_fwd_outputs=num_fwd_outputs
    )
    return Split(forward, backward, _saved_names(forward, num_fwd_outputs), num_fwd_outputs)


def order_backward(backward: fx.GraphModule) -> fx.GraphModule:
    """Put each recomputation directly before the first gradient that needs it, as autograd's engine would."""
    partitioners = _torch_partitioner()
    ordered: fx.GraphModule = partitioners.raise_getitems(partitioners.reordering_to_mimic_autograd_engine(backward))
    return ordered


def _saved_names(forward: fx.GraphModule, num_fwd_outputs: int) -> tuple[str, ...]:
    (output,) = forward.graph.find_nodes(op="output")
    return tuple(n.name for n in output.args[0][num_fwd_outputs:] if isinstance(n, fx.Node))


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


def readable_inputs(joint: fx.GraphModule) -> set[fx.Node]:
    """The inputs that hold in the backward what they held in the forward: no tangents, nothing that is mutated."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    described = {d.mutated_input for d in _output_descriptors(joint) if hasattr(d, "mutated_input")}
    mutated = {n for n in placeholders if n.meta.get("desc") in described}
    for node in joint.graph.nodes:
        if node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            mutated.update(a for a in node.all_input_nodes[:1] if a.op == "placeholder")
    return {n for n in placeholders if "tangents" not in str(n.target)} - mutated


def num_mutated_outputs(gm: fx.GraphModule) -> int:
    """How many leading outputs are not the user's, but new values of inputs that AOTAutograd copies back."""
    return sum(1 for d in _output_descriptors(gm) if hasattr(d, "mutated_input"))


def _output_descriptors(gm: fx.GraphModule) -> list[Any]:
    """AOTAutograd's description of each output; private: `output.meta["desc"]`, `InputMutationAOTOutput`."""
    (output,) = gm.graph.find_nodes(op="output")
    return [d for d in output.meta.get("desc", ()) if d is not None]


def canonical_saved(joint: fx.GraphModule, saved: Collection[fx.Node]) -> list[fx.Node]:
    """What min-cut saved, made small and alike in every layer.

    A view, expand or cast gives way to its smallest ancestor; a value that cheap ops make from inputs and from other
    saved values is not saved at all. The result is in graph order, and still gives the backward all that it needs.
    """
    inputs = readable_inputs(joint)
    chosen = {_smallest_ancestor(n, inputs) for n in saved}
    position = {n: i for i, n in enumerate(joint.graph.nodes)}
    # Latest first: a later value is made from earlier ones, and dropping it cannot take away what they need.
    for node in sorted(chosen - inputs, key=position.__getitem__, reverse=True):
        chain = recompute_chain(node, (chosen - {node}) | inputs)
        if chain is not None and all(is_cheap(n) for n in chain):
            chosen.discard(node)
    return sorted(chosen, key=position.__getitem__)


def _smallest_ancestor(node: fx.Node, inputs: Collection[fx.Node]) -> fx.Node:
    """Follow views and casts of a single value up, to the smallest of them; the oldest among equals.

    A view holds its whole storage, so that the storage itself is saved in its place: once, however many views.
    """
    storage = storage_of(node)
    if storage.op == "call_function" or storage in inputs:
        node = storage
    best = current = node
    while current.op == "call_function" and is_cheap(current) and len(current.all_input_nodes) == 1:
        parent = current.all_input_nodes[0]
        if not (is_view(current) or _is_copy(current)) or not nbytes(parent):
            break
        if parent.op == "placeholder" and parent not in inputs:
            break
        current = parent
        if nbytes(current) <= nbytes(best):
            best = current
    return best


def _is_copy(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name in {"prims::convert_element_type", "aten::_to_copy", "aten::clone"}
