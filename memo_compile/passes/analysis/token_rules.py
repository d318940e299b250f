"""What each op does to the token axis: one rule for each op. At an op without a rule slicing ends.

A rule gets an op and the token axes of its operands. It returns the axis of the output along which row i depends on
row i of the operands, and the axis along which each operand must be sliced to compute such a row. Rules follow from
what the op computes, never from sizes that happen to be equal. So a wrongly chosen token axis can make slicing worse,
but not wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.collective_rules import COLLECTIVES
from memo_compile.passes.analysis.token_axis import (
    Axes,
    Flow,
    Rule,
    TokenAxis,
    fresh,
    is_tensor,
    need_of,
    of_first_operand,
    only,
    shape_of,
    through_view,
    wrapped,
)
from memo_compile.passes.fx.facts import has_tag, is_random, schema_name


def flow(node: fx.Node, axes: Axes) -> Flow | str:
    """The flow of the token axis through `node`, or why it ends there."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return f"no rule for {target}"
    if target is torch.ops.aten.view.dtype:  # of the same name as the view of another shape, and no such view
        return f"no rule for {target}"
    rule = RULES.get(schema_name(node))
    if rule is None and is_elementwise(node):
        rule = pointwise
    if rule is None:
        return f"no rule for {target}"
    found = rule(node, axes)
    return found if found is not None else f"{target} reads across the token axis"


def reads_nothing(node: fx.Node) -> bool:
    """Whether a value is made beside another, of whose numbers none is read: no token axis goes on there, or ends."""
    return schema_name(node) in _BESIDE


_BESIDE = frozenset({"aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty"})


def is_elementwise(node: fx.Node) -> bool:
    """Whether every element of the result reads the elements of the operands at its own place, broadcast."""
    name = schema_name(node)
    return has_tag(node, torch.Tag.pointwise) or name in _ELEMENTWISE


_ELEMENTWISE = frozenset(
    {
        "prims::convert_element_type",
        "aten::_to_copy",
        "aten::clone",
        "aten::copy",
        "aten::where",
        "aten::full_like",
        "aten::detach",
        "aten::alias",
        "prims::fma",
        "aten::expand",
    }
)


def pointwise(node: fx.Node, axes: Axes) -> Flow | None:
    """Elementwise with broadcasting: row i of the output reads row i of each operand that has the dimension."""
    if not is_tensor(node):
        return None
    rank = len(shape_of(node))
    for operand in node.all_input_nodes:
        axis = axes.get(operand)
        if axis is None:
            continue
        out = axis.at(axis.dim + rank - len(shape_of(operand)))
        if out.dim >= 0 and shape_of(node)[out.dim] == axis.outer * axis.tokens * axis.inner:
            return Flow((out,), needs_of_pointwise(node, out))
    return None


def needs_of_pointwise(node: fx.Node, out: TokenAxis) -> tuple[TokenAxis | None, ...]:
    """What rows of an elementwise result need of each operand."""
    rank = len(shape_of(node))
    return tuple(need_of(o, rank, out) for o in node.all_input_nodes)


@of_first_operand
def _view(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    out = through_view(shape_of(source), axis, shape_of(node))
    return None if out is None else Flow((out,), only(node, source, axis))


@of_first_operand
def _permutation(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    rank = len(shape_of(source))
    order = list(range(rank))
    name = schema_name(node)
    args: Any = node.args
    if name == "aten::permute":
        order = [wrapped(d, rank) for d in args[1]]
    else:
        a, b = (0, rank - 1) if name == "aten::t" else (wrapped(args[1], rank), wrapped(args[2], rank))
        if name == "aten::t" and rank < 2:
            a = b = 0
        order[a], order[b] = order[b], order[a]
    return Flow((axis.at(order.index(axis.dim)),), only(node, source, axis))


@of_first_operand
def _expand(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    return Flow((axis.at(axis.dim + len(shape_of(node)) - len(shape_of(source))),), only(node, source, axis))


@of_first_operand
def _unsqueeze(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    args: Any = node.args
    at = wrapped(args[1], len(shape_of(source)) + 1)
    return Flow((axis.at(axis.dim + (at <= axis.dim)),), only(node, source, axis))


def _along(position: int, default: int = 0) -> Rule:
    """Ops that work along one dimension, given as argument `position`: another than the token's leaves rows alone."""

    @of_first_operand
    def rule(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
        args: Any = node.args
        dim = wrapped(args[position] if len(args) > position else default, len(shape_of(source)))
        if dim == axis.dim:
            return None
        count = len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else 1
        return Flow((axis,) * count, only(node, source, axis))

    return rule


@of_first_operand
def _slice(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    args: Any = node.args
    dim = wrapped(args[1] if len(args) > 1 else 0, len(shape_of(source)))
    if dim == axis.dim and shape_of(node) != shape_of(source):
        return fresh(node, axis)
    return Flow((axis,), only(node, source, axis))


@of_first_operand
def _select(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    args: Any = node.args
    dim = wrapped(args[1], len(shape_of(source)))
    if dim == axis.dim:
        return None
    return Flow((axis.at(axis.dim - (dim < axis.dim)),), only(node, source, axis))


@of_first_operand
def _unbind(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    args: Any = node.args
    dim = wrapped(args[1] if len(args) > 1 else 0, len(shape_of(source)))
    if dim == axis.dim:
        return None
    return Flow((axis.at(axis.dim - (dim < axis.dim)),) * len(node.meta["val"]), only(node, source, axis))


def _cat(node: fx.Node, axes: Axes) -> Flow | None:
    args: Any = node.args
    parts = [p for p in args[0] if isinstance(p, fx.Node)]
    rank = len(shape_of(node))
    dim = wrapped(args[1] if len(args) > 1 else 0, rank)
    for part in parts:
        axis = axes.get(part)
        if axis is not None and axis.dim != dim:
            fits = all(len(shape_of(p)) == rank and shape_of(p)[axis.dim] == shape_of(node)[axis.dim] for p in parts)
            return Flow((axis,), (axis,) * len(node.all_input_nodes)) if fits else None
        if axis is not None:
            return fresh(node, axis)
    return None


@of_first_operand
def _reduction(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    """sum, mean, amax, var_mean, …: rows survive where the token dimension is not reduced."""
    args: Any = node.args
    rank = len(shape_of(source))
    dims: Any = args[1] if len(args) > 1 else node.kwargs.get("dim")
    if dims is None or dims == []:
        return None
    reduced = {wrapped(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if axis.dim in reduced:
        return None
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    outputs = []
    for value in values:
        kept = value.dim() == rank
        outputs.append(axis if kept else axis.at(axis.dim - sum(1 for d in reduced if d < axis.dim)))
    return Flow(tuple(outputs), only(node, source, axis))


def _mm(node: fx.Node, axes: Axes) -> Flow | None:
    args: Any = node.args
    left, right = args[-2], args[-1]
    out_rank = len(shape_of(node))
    batched = out_rank == 3
    rows, columns = (1, 2) if batched else (0, 1)

    def answer(out: TokenAxis, need_left: TokenAxis | None, need_right: TokenAxis | None) -> Flow:
        needs: list[TokenAxis | None] = []
        for operand in node.all_input_nodes:
            wanted = [n for o, n in ((left, need_left), (right, need_right)) if o is operand]
            if not wanted:
                needs.append(need_of(operand, out_rank, out))  # the bias of addmm broadcasts
            else:
                needs.append(wanted[0] if all(w == wanted[0] for w in wanted) else None)
        return Flow((out,), tuple(needs))

    if left is right:
        return None
    a, b = axes.get(left), axes.get(right)
    if batched and ((a is not None and a.dim == 0) or (b is not None and b.dim == 0)):
        axis = a if a is not None and a.dim == 0 else b
        return None if axis is None else answer(axis, axis, axis)
    if a is not None and a.dim == rows:
        return answer(a, a, None)
    if b is not None and b.dim == columns:
        return answer(b, None, b)
    return None


@of_first_operand
def _layer_norm(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    args: Any = node.args
    if axis.dim >= len(shape_of(source)) - len(args[1]):
        return None
    return Flow((axis, axis, axis), only(node, source, axis))


def _embedding(node: fx.Node, axes: Axes) -> Flow | None:
    args: Any = node.args
    index = args[1]
    if index not in axes:
        return None
    return Flow((axes[index],), only(node, index, axes[index]))


def _gather(node: fx.Node, axes: Axes) -> Flow | None:
    args: Any = node.args
    source, dim, index = args[0], args[1], args[2]
    rank = len(shape_of(source))
    for operand in (index, source):
        axis = axes.get(operand)
        same = axis is not None and shape_of(source)[axis.dim] == shape_of(index)[axis.dim]
        if axis is not None and same and axis.dim != wrapped(dim, rank):
            return Flow((axis,), tuple(axis if n in (source, index) else None for n in node.all_input_nodes))
    return None


@of_first_operand
def _pad(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    args: Any = node.args
    from_end = 2 * (len(shape_of(source)) - 1 - axis.dim)
    if any(args[1][from_end : from_end + 2]):
        return fresh(node, axis)
    return Flow((axis,), only(node, source, axis))


def _scattered(node: fx.Node, axes: Axes) -> Flow | None:
    """`slice_scatter` and `select_scatter`: one value over a part of another. Along the tokens, rows move.

    T5 shifts its labels by `shifted[:, 1:] = labels[:, :-1]` and `shifted[:, 0] = start`.
    """
    args: Any = node.args
    base, source = args[0], args[1]
    rank = len(shape_of(base))
    dim = wrapped(args[2] if len(args) > 2 else 0, rank)
    dropped = rank - len(shape_of(source))  # of a part that was selected, the dimension itself
    by_source = axes.get(source)
    if by_source is not None and dropped and dim <= by_source.dim:
        by_source = by_source.at(by_source.dim + 1)
    axis = axes.get(base) or by_source
    if axis is None or axis.dim == dim:
        return None if axis is None else fresh(node, axis)
    if by_source not in (None, axis):
        return None
    of_part = axis.at(axis.dim - 1) if dropped and dim < axis.dim else axis
    return Flow((axis,), tuple(of_part if n is source else axis for n in node.all_input_nodes))


def _attention(node: fx.Node, axes: Axes) -> Flow | None:
    """Fused attention over (batch, heads, sequence, head size): rows of the output follow those of the query.

    Along the batch rows are independent. Along the sequence each row reads all keys, so that none can be computed
    alone: the axis only tells how the result can be stored in slices.
    """
    args: Any = node.args
    query = args[0]
    if query not in axes:
        return None
    axis = axes[query]
    outputs = []
    for value in node.meta["val"]:
        fits = isinstance(value, torch.Tensor) and value.dim() > axis.dim
        size = axis.outer * axis.tokens * axis.inner
        outputs.append(axis if fits and int(value.shape[axis.dim]) == size else None)
    if axis.dim == 0:
        rank = len(shape_of(query))
        needs = tuple(need_of(n, rank, axis) for n in node.all_input_nodes)
        return Flow(tuple(outputs), needs)
    # The mask, which no data input reaches, can be stored by rows of the query.
    stored = (None if n in axes else need_of(n, len(shape_of(query)), axis) for n in node.all_input_nodes)
    return Flow(tuple(outputs), tuple(stored), mixing=True)


@of_first_operand
def _dropout(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    return Flow((axis, axis), only(node, source, axis))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::squeeze"), _view),
    **dict.fromkeys(("aten::t", "aten::transpose", "aten::permute"), _permutation),
    "aten::expand": _expand,
    "aten::unsqueeze": _unsqueeze,
    **dict.fromkeys(("aten::split", "aten::split_with_sizes"), _along(2)),
    "aten::unbind": _unbind,
    "aten::slice": _slice,
    "aten::select": _select,
    "aten::cat": _cat,
    **dict.fromkeys(
        ("aten::_softmax", "aten::_safe_softmax", "aten::_log_softmax", "aten::softmax", "aten::log_softmax"), _along(1)
    ),
    "aten::cumsum": _along(1),
    **dict.fromkeys(
        (
            "aten::sum",
            "aten::mean",
            "aten::amax",
            "aten::amin",
            "aten::var_mean",
            "aten::var",
            "aten::logsumexp",
            "aten::argmax",
            "aten::any",
        ),
        _reduction,
    ),
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"), _mm),
    "aten::native_layer_norm": _layer_norm,
    "aten::embedding": _embedding,
    "aten::gather": _gather,
    "aten::constant_pad_nd": _pad,
    **dict.fromkeys(("aten::slice_scatter", "aten::select_scatter"), _scattered),
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
        ),
        _attention,
    ),
    "aten::native_dropout": _dropout,
    **COLLECTIVES,
    # Tagged as pointwise, but their operands do not broadcast.
    **dict.fromkeys(
        ("aten::index", "aten::index_put", "aten::slice_backward", "aten::select_backward"), lambda n, a: None
    ),
}


def sliceable(node: fx.Node, found: Flow) -> bool:
    """Whether running the op on sliced operands gives a slice of its result."""
    return not found.mixing and not is_random(node)
