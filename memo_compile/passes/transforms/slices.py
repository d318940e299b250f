"""Acts on a plan: gives every saved activation its homes, token slice by token slice.

In the forward, the offloaded rows of a value start their way to the host as soon as they are final, and the kept rows
are all that is saved. In the backward the value is put together again from its parts: rows that were kept, rows that
are prefetched, rows that are recomputed from sliced operands. A value that is recomputed whole needs no slices: it
is not saved, and the split recomputes it (`partition.split_saving`).

Rows lie in the order offloaded, recomputed, kept.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.recompute_chains import recompute_chain
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.build import call, fake_mode
from memo_compile.passes.fx.facts import HOST_LEASE, storage_of
from memo_compile.passes.fx.meta import PART_OF, TOKENS, UNCHECKED, Role
from memo_compile.passes.fx.mutations import readable_inputs
from memo_compile.passes.fx.provenance import provenance
from memo_compile.passes.fx.sizes import is_symbolic, largest
from memo_compile.passes.transforms.partition import (
    SYMBOL,
    Split,
    order_backward,
    received,
    saved_kind,
)
from memo_compile.passes.transforms.residency import Residency, Transfer, host_layout
from memo_compile.passes.transforms.token_slices import (
    concat_tokens,
    rows_between,
    slice_value,
    slice_view,
    sliced_copy,
)


@dataclass(frozen=True)
class Sliced:
    """The two graphs that carry a residency out, transfers in the order in which they start."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[str, ...]
    transfers: tuple[Transfer, ...]
    host_bytes: int


def fetch(lease: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Marks, in a backward not yet ordered, a slice that comes back from the host. `schedule` replaces it by transfers.

    Raises:
        AssertionError: always; a graph that still holds the mark was not scheduled.
    """
    raise AssertionError("a fetch mark was run: the backward was not scheduled")


def apply_residency(
    joint: fx.GraphModule, split: Split, residency: Mapping[str, Residency], host_budget: int = -1
) -> Sliced:
    """Rewrite both graphs of `split` so that each saved value in `residency` has its own.

    `split.backward` must be unordered, as `split_saving` leaves it; the result's backward is ordered, its fetches still
    marks. Values not in `residency` are kept whole.
    """
    split = _with_sources(joint, split, residency)
    transfers, host_bytes = host_layout(split, residency)
    offsets = {t.value: t.offset for t in transfers}
    saved = _rewrite_forward(split, residency, offsets, host_bytes, host_budget)
    _rewrite_backward(joint, split, residency, offsets, host_bytes)
    saved = _in_torchs_order(split, saved)
    backward = order_backward(split.backward)
    split.forward.recompile()
    backward.recompile()
    return Sliced(split.forward, backward, saved, transfers, host_bytes)


def _in_torchs_order(split: Split, saved: tuple[str, ...]) -> tuple[str, ...]:
    """Put what the forward hands on in the order of its kinds, that AOTAutograd tells them apart by (`saved_kind`)."""
    (output,) = split.forward.graph.find_nodes(op="output")
    results, handed_on = output.args[0][: split.num_forward_outputs], output.args[0][split.num_forward_outputs :]
    kinds = [saved_kind(n) for n in handed_on]
    symbols_last = sorted(range(len(kinds)), key=lambda i: kinds[i] == SYMBOL)
    inputs = dict(zip(symbols_last, received(split.backward, len(kinds)), strict=True))
    order = sorted(range(len(kinds)), key=lambda i: kinds[i])
    output.args = ((*results, *(handed_on[i] for i in order)),)
    tangent = _first_tangent(split.backward.graph)
    for i in sorted(order, key=lambda i: kinds[i] != SYMBOL):
        tangent.prepend(inputs[i])
    return tuple(saved[i] for i in order)


def _with_sources(joint: fx.GraphModule, split: Split, residency: Mapping[str, Residency]) -> Split:
    """Hand on the inputs that only recomputed slices read; they are the user's, and cost nothing to save."""
    present = {n.name for n in split.backward.graph.nodes}
    originals = {n.name: n for n in joint.graph.nodes}
    inputs = readable_inputs(joint)
    wanted: dict[str, None] = {}
    for name, plan in residency.items():
        if plan.recomputed and name in split.saved:
            chain = _chain(joint, originals[name], present)
            wanted.update((a.name, None) for n in chain for a in n.all_input_nodes if a in inputs)
    extra = [n for n in wanted if n not in present]
    if not extra:
        return split
    sources = {n.name: n for n in split.forward.graph.find_nodes(op="placeholder")}
    (output,) = split.forward.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *(sources[name] for name in extra)),)
    graph = split.backward.graph
    with graph.inserting_before(_first_tangent(graph)):
        for name in extra:
            placeholder = graph.placeholder(name)
            placeholder.meta.update(sources[name].meta)
    return replace(split, saved=(*split.saved, *extra))


def _first_tangent(graph: fx.Graph) -> fx.Node:
    """Where the saved values of a backward end."""
    return next(n for n in graph.nodes if n.op != "placeholder" or "tangents" in str(n.target))


def _chain(joint: fx.GraphModule, value: fx.Node, present: Collection[str]) -> list[fx.Node]:
    """What makes `value` again, from what the backward holds and from the inputs."""
    available = {n for n in joint.graph.nodes if n.name in present and n is not value}
    chain = recompute_chain(value, available | readable_inputs(joint))
    assert chain is not None, f"{value.name} was given to recomputation but cannot be recomputed"
    return chain


def _rewrite_forward(
    split: Split, residency: Mapping[str, Residency], offsets: Mapping[str, int], host_bytes: int, host_budget: int
) -> tuple[str, ...]:
    graph = split.forward.graph
    (output,) = graph.find_nodes(op="output")
    outputs: list[Any] = list(output.args[0])
    kept: list[fx.Node] = []
    lease: fx.Node | None = None
    if offsets:
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first), provenance(split.forward, "the host memory of this call's offloads"):
            size = (host_bytes, host_budget, _device_of(graph, offsets))
            lease = call(graph, torch.ops.memo.host_lease.default, size)
    for value in outputs[split.num_forward_outputs :]:
        plan = residency.get(value.name)
        if plan is None or plan.kept == plan.tokens:
            kept.append(value)
            continue
        if plan.offloaded:
            assert lease is not None
            with provenance(split.forward, f"{_rows(value.name, plan, 0, plan.offloaded)} go to the host", value.name):
                _offload(graph, value, plan, lease, offsets[value.name])
        if plan.kept:
            why = f"{_rows(value.name, plan, plan.tokens - plan.kept, plan.tokens)} stay on the device, alone"
            with graph.inserting_before(_after(_last_use(value, value))), provenance(split.forward, why, value.name):
                rows = _physical_rows(graph, value, plan, plan.tokens - plan.kept, plan.tokens)
                copy = call(graph, torch.ops.memo.keep.default, (rows,))
                copy.meta[PART_OF] = value.name
                copy.meta.update({key: value.meta[key] for key in (UNCHECKED,) if key in value.meta})
                kept.append(copy)
    saved = [*kept, *([lease] if lease is not None else [])]
    output.args = (tuple(outputs[: split.num_forward_outputs]) + tuple(saved),)
    if "desc" in output.meta:
        output.meta["desc"] = _descriptions(output.meta["desc"], split.num_forward_outputs, len(saved))
    output.meta.pop("output_stack_traces", None)
    return tuple(n.name for n in saved)


def _device_of(graph: fx.Graph, names: Collection[str]) -> torch.device:
    """The device that slices leave: what the host memory must be good for."""
    devices = [n.meta["val"].device for n in graph.nodes if n.name in names]
    return next((d for d in devices if d.type != "cpu"), devices[0])


def _rows(name: str, plan: Residency, lo: int, hi: int) -> str:
    return name if plan.tokens == 1 else f"rows [{lo}, {hi}) of {plan.tokens} of {name}"


def _descriptions(old: list[Any], forward_outputs: int, saved: int) -> list[Any]:
    from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput  # loads torch

    return list(old[:forward_outputs]) + [SavedForBackwardsAOTOutput(i) for i in range(saved)]


def _offload(graph: fx.Graph, value: fx.Node, plan: Residency, lease: fx.Node, offset: int) -> None:
    """Start the copy where the value is final; `schedule_waits` moves the wait to where the copy has ended."""
    with graph.inserting_before(_after(value)):
        rows = _offloaded_rows(graph, value, plan)
        start = call(graph, torch.ops.memo.offload.default, (rows, lease, offset))
    with graph.inserting_before(_after(_last_use(value, start))):
        call(graph, torch.ops.memo.offload_wait.default, (rows, lease, offset))


def _after(node: fx.Node) -> fx.Node:
    """The place after a node, and after the tuple items or placeholders that must stand together."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def _last_use(value: fx.Node, start: fx.Node) -> fx.Node:
    """The last node from `start` on that reads the value's storage."""
    storage = storage_of(value)
    last, stack, seen = start, [storage], {storage}
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and user > last:
                last = user
            # An op may return what it was given as one item of several.
            lie_there = [n for n in (user, *user.users) if n not in seen and storage_of(n) is storage]
            seen.update(lie_there)
            stack += lie_there
    return last


def _rewrite_backward(
    joint: fx.GraphModule, split: Split, residency: Mapping[str, Residency], offsets: Mapping[str, int], host_bytes: int
) -> None:
    graph = split.backward.graph
    originals = {n.name: n for n in joint.graph.nodes}
    order = {n.name: i for i, n in enumerate(joint.graph.nodes)}
    # By name only what the split made: nodes inserted below take fresh names that the joint graph may know too.
    present = {n.name: n for n in graph.nodes if n.op != "output"}
    place = {n: order[n.name] for n in present.values() if n.name in order and n.op != "placeholder"}
    lease: fx.Node | None = None
    if offsets:
        with graph.inserting_before(_first_tangent(graph)):
            lease = graph.placeholder(HOST_LEASE)
            with fake_mode(graph):
                lease.meta["val"] = torch.empty(host_bytes, dtype=torch.uint8, device="cpu")
    for name in split.saved:  # in the forward's order: a value's operands are put together before it
        plan = residency.get(name)
        if plan is None or plan.kept == plan.tokens:
            continue
        held = present[name]
        value: torch.Tensor = held.meta["val"]
        before = _first_after(graph, place, order[name])
        back, kept_from = plan.offloaded, plan.offloaded + plan.recomputed
        with (
            graph.inserting_before(before),
            provenance(split.backward, f"{name} is put together again", name, Role.PREFETCHED),
        ):
            parts: list[fx.Node] = []
            if plan.offloaded:
                assert lease is not None
                with provenance(
                    split.backward, f"{_rows(name, plan, 0, back)} come back from the host", role=Role.PREFETCHED
                ):
                    parts.append(_fetched(graph, lease, offsets[name], value, plan))
            if plan.recomputed:
                with provenance(
                    split.backward, f"{_rows(name, plan, back, kept_from)} are recomputed", role=Role.RECOMPUTED
                ):
                    parts.append(_recomputed(joint, graph, originals[name], present, plan))
            if plan.kept:
                with provenance(
                    split.backward, f"{_rows(name, plan, kept_from, plan.tokens)} were kept", role=Role.KEPT
                ):
                    parts.append(_kept_rows(graph, held, plan))
            whole = parts[0] if len(parts) == 1 else _joined(graph, parts, value, plan)
            whole = _logical(graph, whole, value)
            whole.meta.update({TOKENS: held.meta[TOKENS]} if TOKENS in held.meta else {})
        held.replace_all_uses_with(whole, delete_user_cb=lambda user, w=whole: user is not w)
        graph.erase_node(held)
        present[name] = whole


def _joined(graph: fx.Graph, parts: Sequence[fx.Node], value: torch.Tensor, plan: Residency) -> fx.Node:
    axis = _physical_axis(value, plan)
    return concat_tokens(graph, parts, axis, value.shape[_physical_order(value)[axis.dim]])


def _fetched(graph: fx.Graph, lease: fx.Node, offset: int, value: torch.Tensor, plan: Residency) -> fx.Node:
    shape = _slice_shape(value, plan, 0, plan.offloaded)
    node = graph.call_function(fetch, (lease, offset, tuple(map(largest, shape)), value.dtype))
    with fake_mode(graph):
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    return node


def _kept_rows(graph: fx.Graph, held: fx.Node, plan: Residency) -> fx.Node:
    """A placeholder for the kept rows, in the place of the one for the whole value."""
    value: torch.Tensor = held.meta["val"]
    with graph.inserting_before(held):
        rows = graph.placeholder(f"{held.name}_kept")
    rows.meta[PART_OF] = held.name
    with fake_mode(graph):
        shape = _slice_shape(value, plan, plan.tokens - plan.kept, plan.tokens)
        rows.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    return rows


def _recomputed(
    joint: fx.GraphModule, graph: fx.Graph, value: fx.Node, present: Mapping[str, fx.Node], plan: Residency
) -> fx.Node:
    """Rows of `value` recomputed from what the backward holds, in physical order."""
    assert plan.axis is not None
    chain = _chain(joint, value, present)
    lo, hi = plan.offloaded, plan.offloaded + plan.recomputed
    rows = _sliced_chain(graph, value, chain, present, lo, hi)
    return _permuted(graph, rows, _physical_order(value.meta["val"]))


def _sliced_chain(
    graph: fx.Graph, value: fx.Node, chain: Sequence[fx.Node], present: Mapping[str, fx.Node], lo: int, hi: int
) -> fx.Node:
    in_chain = frozenset(chain)
    sliced: dict[fx.Node, fx.Node] = {}
    whole: dict[fx.Node, fx.Node] = {}

    def make_whole(node: fx.Node) -> fx.Node:
        if node not in in_chain:
            return present[node.name]
        if node not in whole:
            whole[node] = graph.node_copy(node, make_whole)
        return whole[node]

    def make_rows(node: fx.Node, axis: TokenAxis) -> fx.Node:
        info: TokenInfo | None = node.meta.get(TOKENS)
        # An item of a tuple that the backward holds whole is cut itself: a tuple cannot be.
        held = node not in in_chain or (node.target is operator.getitem and node.args[0] not in in_chain)
        if held or info is None or not info.sliceable or info.axis != axis:
            return slice_value(graph, make_whole(node), axis, lo, hi)
        if node not in sliced:
            arguments = {
                a: make_whole(a) if need is None else make_rows(a, need)
                for a, need in zip(node.all_input_nodes, info.operands, strict=True)
            }
            sliced[node] = sliced_copy(graph, node, info, arguments, lo, hi)
        return sliced[node]

    return make_rows(value, value.meta[TOKENS].axis)


# Physical order: slices are cut and joined along memory, so that a whole value has the strides that its readers expect.


def _physical_order(value: torch.Tensor) -> tuple[int, ...]:
    strides = [largest(s) for s in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda d: (-strides[d], d)))


def _physical_axis(value: torch.Tensor, plan: Residency) -> TokenAxis:
    assert plan.axis is not None
    place = _physical_order(value).index(plan.axis.dim)
    return plan.axis.at(place)


def _slice_shape(value: torch.Tensor, plan: Residency, lo: int, hi: int) -> tuple[Any, ...]:
    """The shape of token rows [lo, hi), in physical order."""
    sizes = [value.shape[d] for d in _physical_order(value)]
    shape = [s if is_symbolic(s) else int(s) for s in sizes]
    if hi - lo != plan.tokens:
        axis = _physical_axis(value, plan)
        shape[axis.dim] = rows_between(axis, shape[axis.dim], lo, hi)
    return tuple(shape)


def _physical_rows(graph: fx.Graph, value: fx.Node, plan: Residency, lo: int, hi: int) -> fx.Node:
    physical = _permuted(graph, value, _physical_order(value.meta["val"]))
    if hi - lo == plan.tokens:
        return physical
    return slice_value(graph, physical, _physical_axis(value.meta["val"], plan), lo, hi)


def _offloaded_rows(graph: fx.Graph, value: fx.Node, plan: Residency) -> fx.Node:
    """The rows that leave, where they lie: row-major they are what `_fetched` asks for, whatever their rank."""
    physical = _permuted(graph, value, _physical_order(value.meta["val"]))
    if plan.offloaded == plan.tokens:
        return physical
    return slice_view(graph, physical, _physical_axis(value.meta["val"], plan), 0, plan.offloaded)


def _logical(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> fx.Node:
    order = _physical_order(value)
    return _permuted(graph, node, tuple(order.index(d) for d in range(len(order))))


def _permuted(graph: fx.Graph, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    if order == tuple(range(len(order))):
        return node
    return call(graph, torch.ops.aten.permute.default, (node, list(order)))


def _first_after(graph: fx.Graph, place: Mapping[fx.Node, int], position: int) -> fx.Node:
    """The first node that the joint graph has after `position`: what is put before it stands in a valid order."""
    for node in graph.nodes:
        if node.op == "output" or place.get(node, -1) > position:
            return node
    raise AssertionError("a graph without output")
