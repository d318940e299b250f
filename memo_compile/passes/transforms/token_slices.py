"""Cuts values and ops into token slices along the axis that `analysis.tokens` found, and joins slices again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.build import call, reshape, told
from memo_compile.passes.fx.facts import schema_name
from memo_compile.passes.fx.ranges import quotient, row_at
from memo_compile.passes.fx.sizes import is_symbolic, largest

_VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::squeeze"})


def extent_of(axis: TokenAxis, size: Any) -> tuple[Any, Any, Any]:
    """(outer, tokens, inner) of the axis' dimension, which is of that size: symbols, where the size is one.

    Raises:
        NoRange: the size is no such product at every length.
    """
    if not is_symbolic(size):
        return axis.outer, axis.tokens, axis.inner
    if axis.outer == axis.inner == 1:
        return 1, size, 1
    length = axis.tokens if axis.length is None else axis.length
    rest = quotient(size, length)
    if not is_symbolic(rest):
        return axis.outer, length, axis.inner
    if axis.outer == 1:
        return 1, length, rest
    return quotient(rest, axis.inner), length, axis.inner


def rows_between(axis: TokenAxis, size: Any, lo: int, hi: int) -> Any:
    """How much of the axis' dimension, which is of that size, token rows [lo, hi) take."""
    outer, tokens, inner = extent_of(axis, size)
    return outer * (row_at(hi, axis.tokens, tokens) - row_at(lo, axis.tokens, tokens)) * inner


def _sizes(node: fx.Node) -> list[Any]:
    """A value's shape, numbers where they are known."""
    return [s if is_symbolic(s) else int(s) for s in node.meta["val"].shape]


def _largest(node: fx.Node) -> list[int]:
    return [largest(s) for s in node.meta["val"].shape]


def slice_value(graph: fx.Graph, node: fx.Node, axis: TokenAxis, lo: int, hi: int) -> fx.Node:
    """Insert nodes that compute token rows [lo, hi) of a value."""
    folded = _sizes(node)
    rows = slice_view(graph, node, axis, lo, hi)
    if axis.outer == 1:
        return rows
    folded[axis.dim] = rows_between(axis, folded[axis.dim], lo, hi)
    return reshape(graph, rows, folded)


def slice_view(graph: fx.Graph, node: fx.Node, axis: TokenAxis, lo: int, hi: int) -> fx.Node:
    """Insert nodes that view token rows [lo, hi) of a dense value where they lie: nothing is copied.

    Where the axis has an outer factor the rows are no view of the value's own rank; the result has two dimensions more.
    """
    shape = _sizes(node)
    outer, tokens, inner = extent_of(axis, shape[axis.dim])
    first, last = (row_at(row, axis.tokens, tokens) for row in (lo, hi))
    if axis.outer == 1:
        return call(graph, torch.ops.aten.slice.Tensor, (node, axis.dim, first * inner, last * inner))
    unfolded = [*shape[: axis.dim], outer, tokens, inner, *shape[axis.dim + 1 :]]
    wide = reshape(graph, node, unfolded)
    return call(graph, torch.ops.aten.slice.Tensor, (wide, axis.dim + 1, first, last))


def concat_tokens(graph: fx.Graph, parts: Sequence[fx.Node], axis: TokenAxis, size: Any = None) -> fx.Node:
    """Insert nodes that join token slices, in order, into the whole value; `size` is that of its token dimension."""
    if axis.outer == 1:
        return call(graph, torch.ops.aten.cat.default, (list(parts), axis.dim))
    whole_size = axis.outer * axis.tokens * axis.inner if size is None else size
    outer, _, inner = extent_of(axis, whole_size)
    wide = []
    for part in parts:
        shape = _sizes(part)
        rows = quotient(shape[axis.dim], outer * inner)
        unfolded = [*shape[: axis.dim], outer, rows, inner, *shape[axis.dim + 1 :]]
        wide.append(reshape(graph, part, unfolded))
    whole = call(graph, torch.ops.aten.cat.default, (wide, axis.dim + 1))
    folded = _sizes(parts[0])
    folded[axis.dim] = whole_size
    return reshape(graph, whole, folded)


def sliced_copy(
    graph: fx.Graph, node: fx.Node, info: TokenInfo, args: Mapping[fx.Node, fx.Node], lo: int, hi: int
) -> fx.Node:
    """Insert a copy of `node` that computes token rows [lo, hi) from `args`, its operands sliced or whole."""
    target: Any = node.target
    new_args: Any = fx.node.map_arg(node.args, lambda n: args[n])
    name = schema_name(node)
    if name in _VIEWS:
        sizes = _sizes(node)
        sizes[info.axis.dim] = rows_between(info.axis, sizes[info.axis.dim], lo, hi)
        return told(reshape(graph, new_args[0], sizes), node)
    if name == "aten::expand":
        sizes = _sizes(node)
        sizes[info.axis.dim] = rows_between(info.axis, sizes[info.axis.dim], lo, hi)
        new_args = (new_args[0], sizes)
    elif name == "aten::slice" and _largest(node) == _largest(node.all_input_nodes[0]):
        return new_args[0]
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: args[n])
    return told(call(graph, target, new_args, kwargs), node)
