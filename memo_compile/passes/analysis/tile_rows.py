"""Along which token rows each op of one graph, forward or backward, may run a tile at a time.

It asks the rules of `token_rules`, on the graph as it is, and knows a few ops more: those of a shifted loss, where
the last tokens have no label, and those of the gradients of a softmax. What leaves the last rows out, or adds zeros in
their place, still has row i made from row i: in a tile, either value has the rows that it has there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import Axes, Flow, TokenAxis, is_tensor, only, shape_of, wrapped
from memo_compile.passes.analysis.token_rules import flow, is_elementwise, needs_of_pointwise, sliceable
from memo_compile.passes.fx.facts import is_pure, is_view, puts_into_zeros, schema_name
from memo_compile.passes.fx.meta import TOKENS

SMALLER = 32  # by this factor a table is, so that rows may be put into one in each tile


@dataclass(frozen=True)
class Rows:
    """The token axis of a value, and of each of `node.all_input_nodes` the axis of which its rows are made.

    None: that operand is needed whole. `summed`: the op adds up over all tokens, and its result has no axis.
    """

    axis: TokenAxis
    needs: tuple[TokenAxis | None, ...]
    summed: bool = False


def tile_rows(gm: fx.GraphModule) -> dict[fx.Node, Rows]:
    """The nodes that may run tile by tile, and those that add up over tokens.

    The graph's inputs, and values that no rule reaches, have the axes that `annotate_tokens` has left on them.
    """
    axes: dict[fx.Node, TokenAxis] = {}
    items: dict[fx.Node, tuple[TokenAxis | None, ...]] = {}
    rows: dict[fx.Node, Rows] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            _visit(node, axes, items, rows)
        if node not in axes and TOKENS in node.meta and is_tensor(node):
            axes[node] = node.meta[TOKENS].axis
    _constants(gm, axes, rows)
    for node in gm.graph.nodes:
        summed = _summed(node, axes) if node.op == "call_function" and node not in axes else None
        if summed is not None:
            rows[node] = summed
    return rows


def _visit(
    node: fx.Node,
    axes: dict[fx.Node, TokenAxis],
    items: dict[fx.Node, tuple[TokenAxis | None, ...]],
    rows: dict[fx.Node, Rows],
) -> None:
    if node.target is operator.getitem:
        parent, index = node.args
        if isinstance(parent, fx.Node) and parent in items and isinstance(index, int):
            axis = items[parent][index] if index < len(items[parent]) else None
            if axis is not None:
                axes[node] = axis
            if axis is not None and parent in rows:
                rows[node] = Rows(axis, (rows[parent].axis,))
        return
    first = GRADIENTS_OF_ATTENTION.get(schema_name(node))
    if first is not None:  # no tiles of it, but of what is made of the gradients
        operands = node.args[first : first + 3]
        items[node] = tuple(axes.get(operand) for operand in operands if isinstance(operand, fx.Node))
        return
    if not is_pure(node) or not any(a in axes for a in node.all_input_nodes):
        return
    found = _flow(node, axes)
    axis = next((a for a in found.outputs if a is not None), None) if found is not None else None
    if found is None or axis is None or not sliceable(node, found):
        return
    rows[node] = Rows(axis, found.needs)
    if is_tensor(node):
        axes[node] = axis
    else:
        items[node] = found.outputs


def _flow(node: fx.Node, axes: Axes) -> Flow | None:
    rule = _MORE.get(schema_name(node))
    found: Flow | str | None = rule(node, axes) if rule is not None else None
    if found is None:
        found = flow(node, axes)
    return found if isinstance(found, Flow) and not found.mixing else None


def _constants(gm: fx.GraphModule, axes: dict[fx.Node, TokenAxis], rows: dict[fx.Node, Rows]) -> None:
    """What no data reaches, and whose rows a reader wants: constants, and what is made of such row by row."""
    for node in reversed(gm.graph.nodes):
        if node not in rows:
            continue
        for operand, need in zip(node.all_input_nodes, rows[node].needs, strict=True):
            known = operand in rows or axes.get(operand, need) != need
            if need is None or known or operand.op != "call_function" or not is_tensor(operand):
                continue
            needs = _needs_for(operand, need)
            if needs is not None:
                rows[operand] = Rows(need, needs)
            axes[operand] = need


def _needs_for(node: fx.Node, axis: TokenAxis) -> tuple[TokenAxis | None, ...] | None:
    """What rows of a value without data need of its operands; None where it is made in no such way."""
    if is_constant(node):
        return ()
    if not is_pure(node):
        return None
    args: Any = node.args
    if is_elementwise(node):
        return needs_of_pointwise(node, axis)
    if schema_name(node) == "aten::embedding":
        within = axis.dim < len(shape_of(args[1]))
        return tuple(axis if n is args[1] else None for n in node.all_input_nodes) if within else None
    source = _axis_before_view(node, axis) if _shows_a_lookup(node) else None
    return None if source is None else only(node, args[0], source)


def _shows_a_lookup(node: fx.Node) -> bool:
    """Whether a value is a view of what is looked up in a table. Other tables, of positions say, stay whole."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return schema_name(node) == "aten::embedding"


def _axis_before_view(node: fx.Node, axis: TokenAxis) -> TokenAxis | None:
    """The axis of what a view shows, whose rows are those that the view has along `axis`."""
    args: Any = node.args
    rank = len(shape_of(node))
    name = schema_name(node)
    if name == "aten::permute":
        return axis.at(wrapped(args[1][axis.dim], rank))
    if name == "aten::unsqueeze":
        added = wrapped(args[1], rank)
        return axis.at(axis.dim - (added < axis.dim)) if added != axis.dim else None
    return None


def is_constant(node: fx.Node) -> bool:
    """Whether a value is one number everywhere, of a shape that is written down."""
    return node.target is torch.ops.aten.full.default


def _summed(node: fx.Node, axes: Axes) -> Rows | None:
    """An op that adds up over tokens: of all rows it makes the sum of what it makes of the rows of each tile."""
    name, operands = schema_name(node), node.all_input_nodes
    if not is_tensor(node) or not node.meta["val"].is_floating_point():
        return None
    if name == "aten::mm" and len(operands) == 2:
        left, right = operands
        by_left, by_right = axes.get(left), axes.get(right)
        axis = by_left if by_left is not None and by_left.dim == 1 else None
        if axis is None and by_right is not None and by_right.dim == 0:
            axis = by_right.at(1)
        return None if axis is None else Rows(axis, (axis, axis.at(0)), summed=True)
    if name == "aten::bmm" and len(operands) == 2:  # of attention that is written out: tokens are those of the queries
        by_left, by_right = map(axes.get, operands)
        axis = by_left.at(1) if by_left is not None and by_left.dim == 2 else by_right
        return None if axis is None or axis.dim != 1 else Rows(axis, (axis.at(2), axis), summed=True)
    if name == "aten::sum" and len(operands) == 1 and operands[0] in axes:
        axis, rank = axes[operands[0]], len(shape_of(operands[0]))
        dims: Any = node.args[1] if len(node.args) > 1 else None
        listed = dims if isinstance(dims, (list, tuple)) else [dims] if isinstance(dims, int) else []
        reduced = {wrapped(d, rank) for d in listed} or set(range(rank))
        return Rows(axis, (axis,), summed=True) if axis.dim in reduced else None
    return _put_into_table(node, axes)


def _put_into_table(node: fx.Node, axes: Axes) -> Rows | None:
    """Rows added to those of a table that is much smaller than they are: each tile makes a table of its own."""
    if not puts_into_zeros(node):
        return None
    args: Any = node.args
    zeros, mask, (index,), values = args
    axis, shape = axes.get(values), shape_of(values)
    if axis is None or axis.dim >= len(shape_of(index)) or SMALLER * math.prod(shape_of(node)) > math.prod(shape):
        return None
    alike = all(
        is_tensor(n) and len(shape_of(n)) > axis.dim and shape_of(n)[axis.dim] == shape[axis.dim] for n in (mask, index)
    )
    needs = tuple(None if n is zeros else axis for n in node.all_input_nodes)
    return Rows(axis, needs, summed=True) if alike and zeros not in (mask, index, values) else None


# Rules for tiles alone.


def _whole_rows(node: fx.Node, source: Any, axes: Axes, dim: Any) -> TokenAxis | None:
    """The axis of `source`, where `dim` is that axis' dimension and tokens alone count along it."""
    axis = axes.get(source) if isinstance(source, fx.Node) else None
    if axis is None or not isinstance(dim, int) or wrapped(dim, len(shape_of(source))) != axis.dim:
        return None
    return axis if axis.outer == axis.inner == 1 else None


def _needs_of(node: fx.Node, **needs: Any) -> tuple[TokenAxis | None, ...]:
    """Needs by the operands' names, None for the others."""
    return tuple(needs.get(n.name) for n in node.all_input_nodes)


def _first_rows(node: fx.Node, axes: Axes) -> Flow | None:
    """`x[:, :n]`: the first rows of x. Starting elsewhere, row i would be another one's."""
    args: Any = node.args
    source, dim = args[0], args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else None
    step = args[4] if len(args) > 4 else 1
    axis = _whole_rows(node, source, axes, dim)
    count = shape_of(node)[axis.dim] if axis is not None else 0
    if axis is None or start not in (None, 0) or step != 1 or count < 2:
        return None
    return Flow((replace(axis, tokens=count),), _needs_of(node, **{source.name: axis}))


def _zeros_after(node: fx.Node, axes: Axes) -> Flow | None:
    """`constant_pad_nd` that adds rows after the last."""
    args: Any = node.args
    source, pads = args[0], args[1]
    rank = len(shape_of(source))
    axis = axes.get(source)
    if axis is None or axis.outer != 1 or axis.inner != 1:
        return None
    before = 2 * (rank - 1 - axis.dim)
    if before + 1 >= len(pads) or pads[before] != 0 or any(p for i, p in enumerate(pads) if i != before + 1):
        return None
    grown = shape_of(node)[axis.dim]
    return (
        Flow((replace(axis, tokens=grown),), _needs_of(node, **{source.name: axis})) if pads[before + 1] > 0 else None
    )


def _written_slice(node: fx.Node, axes: Axes) -> Flow | None:
    """`slice_scatter(base, x, dim, …)`: along another dimension than that of the tokens, rows of both."""
    args: Any = node.args
    base, source, dim = args[0], args[1], args[2] if len(args) > 2 else 0
    axis = axes.get(source) or axes.get(base)
    if axis is None or wrapped(dim, len(shape_of(base))) == axis.dim:
        return _rows_written_first(node, axes)
    return Flow((axis,), tuple(axis for _ in node.all_input_nodes))


def _rows_written_first(node: fx.Node, axes: Axes) -> Flow | None:
    """`slice_scatter(base, x, dim, 0, n)`: rows of x, and after them those of base."""
    args: Any = node.args
    base, source, dim = args[0], args[1], args[2] if len(args) > 2 else 0
    start = args[3] if len(args) > 3 else None
    step = args[5] if len(args) > 5 else 1
    axis = _whole_rows(node, source, axes, dim)
    if axis is None or start not in (None, 0) or step != 1 or base is source or not isinstance(base, fx.Node):
        return None
    grown = replace(axis, tokens=shape_of(node)[axis.dim])
    return Flow((grown,), _needs_of(node, **{base.name: grown, source.name: axis}))


def _gradient_of_first_rows(node: fx.Node, axes: Axes) -> Flow | None:
    """`slice_backward(x, sizes, dim, 0, n, 1)`: rows of x, and after them zeros."""
    args: Any = node.args
    source, _, dim, start, _, step = args
    axis = _whole_rows(node, source, axes, dim)
    if axis is None or start not in (None, 0) or step != 1:
        return None
    grown = replace(axis, tokens=shape_of(node)[axis.dim])
    return Flow((grown,), _needs_of(node, **{source.name: axis}))


def _softmax_gradient(node: fx.Node, axes: Axes) -> Flow | None:
    args: Any = node.args
    gradient, result, dim = args[0], args[1], args[2]
    axis = axes.get(gradient) or axes.get(result)
    if axis is None or wrapped(dim, len(shape_of(gradient))) == axis.dim:
        return None
    return Flow((axis,), tuple(axis for _ in node.all_input_nodes))


def _written_places(node: fx.Node, axes: Axes) -> Flow | None:
    """`scatter(x, dim, index, value)` along another dimension than that of the tokens."""
    args: Any = node.args
    base, dim, index = args[0], args[1], args[2]
    axis = axes.get(index) or axes.get(base)
    operands = node.all_input_nodes
    shapes = [shape_of(n) for n in operands if is_tensor(n)]
    if axis is None or len(shapes) != len(operands) or wrapped(dim, len(shape_of(base))) == axis.dim:
        return None
    alike = all(len(s) == len(shape_of(index)) and s[axis.dim] == shape_of(index)[axis.dim] for s in shapes)
    return Flow((axis,), tuple(axis for _ in operands)) if alike else None


def _stacked(node: fx.Node, axes: Axes) -> Flow | None:
    """`stack(values, dim)`: a new dimension beside that of the tokens."""
    args: Any = node.args
    known = [axes[a] for a in node.all_input_nodes if a in axes]
    dim = wrapped(args[1] if len(args) > 1 else 0, len(shape_of(node)))
    if any(axis != known[0] for axis in known):
        return None
    return Flow((known[0].at(known[0].dim + (dim <= known[0].dim)),), tuple(known[0] for _ in node.all_input_nodes))


def _copied(node: fx.Node, axes: Axes) -> Flow | None:
    """`keep`: row by row, like the value that it copies."""
    (source,) = node.all_input_nodes
    return Flow((axes[source],), (axes[source],)) if source in axes else None


def _constant_like(node: fx.Node, axes: Axes) -> Flow | None:
    """A constant in the shape of another value, of which nothing else is read."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in axes:
        return None
    return Flow((axes[source],), _needs_of(node, **{source.name: axes[source]}))


# By the place of the query, after which key and value stand; each gradient has the shape of one of them.
GRADIENTS_OF_ATTENTION = {
    **{
        f"aten::_scaled_dot_product_{kind}_backward": 1
        for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    },
    "memo::attention_backward_onto": 0,
}

_MORE: Mapping[str, Callable[[fx.Node, Axes], Flow | None]] = {
    "aten::slice": _first_rows,
    "aten::constant_pad_nd": _zeros_after,
    "aten::slice_scatter": _written_slice,
    "aten::slice_backward": _gradient_of_first_rows,
    "aten::_log_softmax_backward_data": _softmax_gradient,
    "aten::_softmax_backward_data": _softmax_gradient,
    "aten::scatter": _written_places,
    "aten::stack": _stacked,
    "aten::zeros_like": _constant_like,
    "aten::ones_like": _constant_like,
    "memo::keep": _copied,
}
