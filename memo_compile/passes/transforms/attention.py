"""Writes what a fused attention makes over what it reads for the last time.

The kernels on the CPU allocate their results, the backward's in a tuple that holds all three gradients until the last
is taken, and have no variants that write to given places. Heads do not depend on each other: so memo calls a kernel for
a few heads at a time, and what each piece makes goes where what it was made from has been read. In a backward that is
often the step at which most is held.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.build import call, fake_mode, told
from memo_compile.passes.fx.facts import argument, dimensions, is_read_from, is_view, nbytes, storage_of
from memo_compile.passes.fx.meta import WHY
from memo_compile.passes.fx.sizes import largest

PIECES = 8  # calls for one attention, at most: more would save little
SMALL = 2  # keys and values smaller by this factor than the queries are copied, so that these can be written over


def write_over_attention_inputs(gm: fx.GraphModule) -> fx.GraphModule:
    """Let results of fused attentions take the places of their inputs, where nothing reads these afterwards.

    Of a forward that is the output in place of the queries, of a backward the gradients in place of all three. Keys and
    values that few heads share are copied where something reads them afterwards: the queries' place is worth more.
    """
    aten = torch.ops.aten
    for node in gm.graph.find_nodes(
        op="call_function", target=aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    ):
        grad_out, query, key, value, out, logsumexp, *_ = node.args
        _rewrite(node, [query, key, value], [grad_out, out, logsumexp], torch.ops.memo.attention_backward_onto.default)
    for node in gm.graph.find_nodes(
        op="call_function", target=aten._scaled_dot_product_flash_attention_for_cpu.default
    ):
        query, key, value, *_ = node.args
        # Rows of a larger value would keep all of it as long as the output lives.
        if isinstance(query, fx.Node) and nbytes(storage_of(query)) <= nbytes(query):
            _rewrite(node, [query], [key, value], torch.ops.memo.attention_onto.default)
    gm.recompile()
    return gm


def _rewrite(node: fx.Node, over: list[Any], beside: list[Any], target: Any) -> None:
    tensors = [*over, *beside]
    pieces = _pieces(node, over[0], tensors)
    if pieces == 1:
        return
    others = [tensors[:i] + tensors[i + 1 :] for i in range(len(over))]
    read = [a for a, b in zip(over, others, strict=True) if not (may_be_overwritten(node, a) and are_apart([a], b))]
    if over[0] in read or SMALL * sum(map(nbytes, read)) > nbytes(over[0]):
        return
    over = [_copy_of(node, a) if a in read else a for a in over]
    plain: list[Any] = [argument(node, "dropout_p"), argument(node, "is_causal"), pieces]
    if len(over) == 1:
        over = [*over, _row_sums(node)]
    node.target, node.args = target, (*over, *beside, *plain)
    node.meta["val"] = tuple(n.meta["val"] for n in over)
    for item in node.users:
        item.meta["val"] = node.meta["val"][item.args[1]]
        _lay_out(item)
    node.meta[WHY] = f"{pieces} calls, a share of the heads each, whose results replace what they read"


def _lay_out(node: fx.Node) -> None:
    """Give views of a value the strides that these have now, as far as they are views of it yet."""
    for view in node.users:
        if is_view(view) and view.all_input_nodes == [node] and isinstance(view.meta.get("val"), torch.Tensor):
            args: Any = fx.node.map_arg((view.args, dict(view.kwargs)), lambda n: n.meta["val"])
            target: Any = view.target
            with fake_mode(node.graph), torch.no_grad(), suppress(RuntimeError, ValueError):
                view.meta["val"] = target(*args[0], **args[1])
                _lay_out(view)


def _copy_of(node: fx.Node, read: fx.Node) -> fx.Node:
    """What is read later as well, once more."""
    with node.graph.inserting_before(node):
        return told(call(node.graph, torch.ops.memo.keep.default, (read,)), read)


def _row_sums(node: fx.Node) -> fx.Node:
    """An empty place for the logarithms of the row sums, laid out as the kernel lays them out."""
    value: torch.Tensor = node.meta["val"][1]  # (batch, heads, rows)
    batch, heads, rows = value.shape
    # Of float64 the kernel makes float64, though the fake values of torch 2.11 say float32.
    dtype = torch.float64 if node.meta["val"][0].dtype == torch.float64 else value.dtype
    with node.graph.inserting_before(node):
        kwargs = {"dtype": dtype, "device": value.device}
        empty = call(node.graph, torch.ops.aten.empty.memory_format, ([batch, rows, heads],), kwargs)
        return call(node.graph, torch.ops.aten.permute.default, (empty, [0, 2, 1]))


def may_be_overwritten(node: fx.Node, value: Any) -> bool:
    """Whether `value` lies in a storage that the graph made, which nothing reads later but what comes of `node`."""
    if not isinstance(value, fx.Node):
        return False
    root = storage_of(value)
    if root.op != "call_function" or root.target is operator.getitem:
        return False
    return not is_read_from(node, value, {node})


def are_apart(over: list[Any], beside: list[Any]) -> bool:
    """Whether what is written shares no byte with itself, nor with anything else that is read."""
    if not all(_spans(a.meta["val"]) for a in over):
        return False
    pairs = [(a, b) for i, a in enumerate(over) for b in [*over[:i], *beside]]
    return all(storage_of(a) is not storage_of(b) or _disjoint(a.meta["val"], b.meta["val"]) for a, b in pairs)


def _pieces(node: fx.Node, query: fx.Node, tensors: list[fx.Node]) -> int:
    """In how many calls one attention can be made: 1 where heads differ in more than their values (masks of their own,
    dropout).
    """
    count = int(query.meta["val"].shape[1])
    heads = {int(n.meta["val"].shape[1]) for n in tensors}
    widths = {int(n.meta["val"].shape[3]) for n in tensors if n.meta["val"].dim() == 4}
    mask = argument(node, "attn_mask")
    for_all = mask is None or (isinstance(mask, fx.Node) and _same_for_all_heads(mask.meta["val"]))
    taken = all(user.target is operator.getitem for user in node.users)
    alike = len(widths) == 1 and len(heads | {count}) <= 2 and max(heads) == count and count % min(heads) == 0
    return min(PIECES, count) if alike and for_all and taken and not argument(node, "dropout_p") else 1


def _same_for_all_heads(mask: torch.Tensor) -> bool:
    return mask.dim() < 4 or int(mask.shape[1]) == 1


def _spans(value: torch.Tensor) -> list[tuple[int, float]]:
    """For each dimension, innermost first: what all within it span, and the step to the next of it; last the whole.

    Empty where elements overlap. In elements.
    """
    found: list[tuple[int, float]] = []
    span = 1
    for stride, size in sorted((t, s) for s, t in dimensions(value) if s != 1):
        if stride < span:
            return []
        found.append((span, stride))
        span += (size - 1) * stride
    return [*found, (span, float("inf"))]


def _disjoint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values with the same strides stand beside each other within one of their dimensions."""
    if a.stride() != b.stride() or a.shape != b.shape:
        return False
    apart = abs(largest(a.storage_offset()) - largest(b.storage_offset()))
    return any(span <= apart and apart + span <= step for span, step in _spans(a))
