"""Splits a joint graph into a forward and a backward, for a chosen set of saved activations.

The private parts of torch's partitioner that memo uses are named in `_torch_partitioner`, and nowhere else.
Tried with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from memo_compile.errors import DrawnTwice
from memo_compile.passes.analysis.recompute_chains import recompute_chain
from memo_compile.passes.analysis.user_checkpoints import MARK, NO_POLICIES, Policies
from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import (
    is_cheap,
    is_pure,
    is_random,
    is_reduction,
    is_seed,
    is_view,
    nbytes,
    schema_name,
    storage_of,
    writes_in_place,
)
from memo_compile.passes.fx.meta import UNCHECKED
from memo_compile.passes.fx.mutations import readable_inputs
from memo_compile.passes.fx.provenance import provenance

NORM_OPS = 48  # ops of a norm or a softmax between its argument and its result, casts and views included, at most
SYMBOL = 3  # of the kinds of saved values, the last
SMALL_STATISTIC = 8  # a reduction is kept beside its argument if it is so many times smaller than the result


@dataclass(frozen=True)
class Split:
    """A forward and a backward graph. `saved` names the forward values that the backward receives, in order."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[str, ...]
    num_forward_outputs: int


def _torch_partitioner() -> Any:
    from torch._functorch import partitioners  # loads Inductor

    return partitioners


def split_min_cut(joint: fx.GraphModule, inputs: Any, num_fwd_outputs: int, static_inputs: list[int] | None) -> Split:
    """torch's own split: what `inductor` would run. The joint graph loses its dead and duplicate nodes on the way.

    It keeps the marks of the user's checkpoints: torch adds marks of its own, which would be taken for the user's.
    """
    marks = {n.name: n.meta[MARK] for n in joint.graph.nodes if MARK in n.meta}
    forward, backward = _torch_partitioner().min_cut_rematerialization_partition(
        joint,
        inputs,
        compiler="inductor",
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_indices=static_inputs,
    )
    for node in joint.graph.nodes:
        node.meta.pop(MARK, None)
        if node.name in marks:
            node.meta[MARK] = marks[node.name]
    return Split(forward, backward, _saved_names(forward, num_fwd_outputs), num_fwd_outputs)


def split_as_torch(joint: fx.GraphModule, inputs: Any, num_fwd_outputs: int, static_inputs: list[int] | None) -> Split:
    """`split_min_cut`, with copies in the joint graph of what is saved and overwritten by then."""
    split = split_min_cut(joint, inputs, num_fwd_outputs, static_inputs)
    if not keep_overwritten(joint, saved_in(joint, split) or ()):
        return split
    return split_min_cut(joint, inputs, num_fwd_outputs, static_inputs)


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
    _check_drawn_once(forward, backward)
    return Split(forward, backward, _saved_names(forward, num_fwd_outputs), num_fwd_outputs)


def _check_drawn_once(forward: fx.GraphModule, backward: fx.GraphModule) -> None:
    """A second draw of the forward's random numbers would give other numbers, and wrong gradients."""
    drawn = {n.name for n in forward.graph.nodes if n.op == "call_function" and is_random(n)}
    redrawn = [n.name for n in backward.graph.nodes if n.op == "call_function" and n.name in drawn]
    if redrawn:
        raise DrawnTwice(redrawn)


def order_backward(backward: fx.GraphModule) -> fx.GraphModule:
    """Put each recomputation directly before the first gradient that needs it, as autograd's engine would."""
    partitioners = _torch_partitioner()
    ordered: fx.GraphModule = partitioners.raise_getitems(partitioners.reordering_to_mimic_autograd_engine(backward))
    return ordered


def saved_in(joint: fx.GraphModule, split: Split) -> list[fx.Node] | None:
    """The nodes of the joint graph that a split saves; None where it saves something that the joint graph lacks.

    In the user's own checkpoints torch rewrites ops that may draw random numbers, attention without dropout among them.
    The forward then saves states of the generator, too, under names that may belong to something else in the joint
    graph: these are left out.
    """
    theirs = {n.name: n for n in split.forward.graph.nodes}
    mine = {n.name: n for n in joint.graph.nodes}
    saved = [n for n in split.saved if not _is_generator_state(theirs[n])]
    return [mine[n] for n in saved] if all(_stands_for(theirs[n], mine.get(n)) for n in saved) else None


def keep_overwritten(joint: fx.GraphModule, saved: Collection[fx.Node]) -> bool:
    """Put a copy in the place of each input that is saved and that the graph itself overwrites; whether there was one.

    torch's split saves such an input itself, and the backward would read what the forward has written to it (a buffer
    that is used and then updated).
    """
    graph, readable = joint.graph, readable_inputs(joint)
    inputs = {storage_of(n) for n in saved} - readable
    overwritten = [n for n in graph.find_nodes(op="placeholder") if n in inputs]
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in overwritten:
        _keep(joint, node, node, first)
    joint.recompile()
    return bool(overwritten)


_STRIDED = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)


def _keep(joint: fx.GraphModule, node: fx.Node, as_it_was: fx.Node, first: fx.Node) -> None:
    """Let the readers of `node` read a copy of `as_it_was`, made before `first`.

    A view by strides and an offset is of the input's own memory, and a copy is laid out otherwise: so that view is
    taken of the input, and copied itself. What writes through one makes the input's new value, and reads the input.
    """
    for view in [u for u in node.users if u.target is torch.ops.aten.as_strided.default and u is not as_it_was]:
        with joint.graph.inserting_before(first):
            earlier = call(joint.graph, view.target, (as_it_was, *view.args[1:]), dict(view.kwargs))
        _keep(joint, view, earlier, first)
    readers = [u for u in node.users if u.op != "output" and u.target not in _STRIDED and not _writes_to(u, node)]
    if not readers:
        return
    with provenance(joint, f"{node.name} as it was, for the backward"), joint.graph.inserting_before(first):
        kept = call(joint.graph, torch.ops.memo.keep.default, (as_it_was,))
    for user in readers:
        user.replace_input_with(node, kept)


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    return writes_in_place(user) and user.args[:1] == (node,)


def _is_generator_state(node: fx.Node) -> bool:
    made = node.all_input_nodes[0] if node.target is operator.getitem else node
    return str(made.target) == "run_and_save_rng_state" and node.args[1:] == (0,)


def _stands_for(node: fx.Node, of: fx.Node | None) -> bool:
    sources = [n.name for n in node.all_input_nodes]
    return of is not None and node.target == of.target and sources == [n.name for n in of.all_input_nodes]


def saved_kind(node: fx.Node) -> int:
    """Where AOTAutograd wants a saved value: tensors that it checks, tensors that it does not, opaque objects, symbols.

    It takes the values of each kind by their number, counted from the end (`tensors_saved_for_backwards_slice` and its
    like, torch/_functorch/_aot_autograd/schemas.py). Torch 2.11 knows no unchecked tensors, and the order is the same.
    """
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
        return SYMBOL
    if isinstance(value, torch.Tensor):
        return int(UNCHECKED in node.meta)
    return 2


def received(backward: fx.GraphModule, saved: int) -> list[fx.Node]:
    """The inputs of a backward through which it gets its `saved` values, in the order in which the forward gives them.

    AOTAutograd passes symbols first, and takes them last.
    """
    placeholders = backward.graph.find_nodes(op="placeholder")[:saved]
    return sorted(placeholders, key=lambda n: saved_kind(n) == SYMBOL)


def _saved_names(forward: fx.GraphModule, num_fwd_outputs: int) -> tuple[str, ...]:
    (output,) = forward.graph.find_nodes(op="output")
    return tuple(n.name for n in output.args[0][num_fwd_outputs:] if isinstance(n, fx.Node))


def canonical_saved(
    joint: fx.GraphModule, saved: Collection[fx.Node], policies: Policies = NO_POLICIES
) -> list[fx.Node]:
    """What min-cut saved, made small and alike in every layer.

    A view, expand or cast gives way to its smallest ancestor, a normalized value to what it was made from and its small
    statistics; a value that cheap ops make from inputs and from other saved values is not saved at all. Seeds of random
    numbers are saved, so that a draw can be recomputed. What the user's own checkpoints must save stays as it is, and
    what they must recompute is never saved. The result is in graph order, and gives the backward all that it needs.
    """
    inputs = readable_inputs(joint)
    fixed = {value for value in saved if value.name in policies.as_they_are}
    banned = {n for n in joint.graph.nodes if n.name in policies.recomputed}
    chosen = fixed | {n for value in set(saved) - fixed for n in _origin(value, inputs, banned)}
    chosen |= {n for n in _ancestors(chosen) if is_seed(n)}
    position = {n: i for i, n in enumerate(joint.graph.nodes)}
    # Latest first: a later value is made from earlier ones, and dropping it cannot take away what they need.
    for node in sorted(chosen - inputs - fixed, key=position.__getitem__, reverse=True):
        chain = recompute_chain(node, (chosen - {node}) | inputs)
        if chain is not None and all(is_cheap(n) for n in chain):
            chosen.discard(node)
    return sorted(chosen, key=position.__getitem__)


def _ancestors(nodes: Collection[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _origin(value: fx.Node, inputs: Collection[fx.Node], banned: Collection[fx.Node]) -> list[fx.Node]:
    """The smallest single value that cheap ops make `value` from, the oldest among equals; and small reductions of it.

    A view holds its whole storage, so that the storage itself is saved in its place: once, however many views. The way
    up is through single values (views, casts), and through norms: elementwise ops on a value and reductions of it.
    Nothing of `banned` is saved in its place.
    """
    storage = storage_of(value)
    start = storage if (storage.op == "call_function" or storage in inputs) and storage not in banned else value
    best, statistics, reduced = start, list[fx.Node](), list[fx.Node]()
    position = {n: i for i, n in enumerate(start.graph.nodes)}
    frontier, copies_only = {start}, True
    for _ in range(NORM_OPS):
        node = max(frontier, key=position.__getitem__)
        if not (is_cheap(node) or _is_statistic(node)):
            break
        frontier.remove(node)
        frontier.update(a for a in node.all_input_nodes if len(node.all_input_nodes) == 1 or a not in inputs)
        if _is_statistic(node) and nbytes(node):
            reduced.append(node)
        copies_only = copies_only and (is_view(node) or _is_copy(node))
        if not frontier or any(n.op == "placeholder" and n not in inputs for n in frontier):
            break
        (parent, *others) = frontier
        if others or not nbytes(parent) or parent in banned:
            continue
        if nbytes(parent) < nbytes(best) or (nbytes(parent) == nbytes(best) and (copies_only or reduced)):
            best, statistics = parent, [n for n in reduced if nbytes(n) * SMALL_STATISTIC <= nbytes(start)]
            copies_only = True
    return [best, *statistics]


def _is_statistic(node: fx.Node) -> bool:
    """A reduction that may run twice, or one of its results."""
    if node.target is operator.getitem:
        return is_reduction(node.all_input_nodes[0])
    return is_reduction(node) and is_pure(node)


def _is_copy(node: fx.Node) -> bool:
    name = schema_name(node)
    return name in {"prims::convert_element_type", "aten::_to_copy", "aten::clone"}
