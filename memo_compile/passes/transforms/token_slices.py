"""Cuts values and ops into token slices along the axis that `analysis.tokens` found, and joins slices again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import TokenAxis, shape_of
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import schema_name

_VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::squeeze"})


def slice_value(graph: fx.Graph, node: fx.Node, axis: TokenAxis, lo: int, hi: int) -> fx.Node:
    """Insert nodes that compute token rows [lo, hi) of a value."""
    shape = shape_of(node)
    rows = slice_view(graph, node, axis, lo, hi)
    if axis.outer == 1:
        return rows
    folded = list(shape)
    folded[axis.dim] = axis.outer * (hi - lo) * axis.inner
    return call(graph, torch.ops.aten.reshape.default, (rows, folded))


def slice_view(graph: fx.Graph, node: fx.Node, axis: TokenAxis, lo: int, hi: int) -> fx.Node:
    """Insert nodes that view token rows [lo, hi) of a dense value where they lie: nothing is copied.

    Where the axis has an outer factor the rows are no view of the value's own rank; the result has two dimensions more.
    """
    shape = shape_of(node)
    if axis.outer == 1:
        return call(graph, torch.ops.aten.slice.Tensor, (node, axis.dim, lo * axis.inner, hi * axis.inner))
    unfolded = [*shape[: axis.dim], axis.outer, axis.tokens, axis.inner, *shape[axis.dim + 1 :]]
    wide = call(graph, torch.ops.aten.reshape.default, (node, unfolded))
    return call(graph, torch.ops.aten.slice.Tensor, (wide, axis.dim + 1, lo, hi))


def concat_tokens(graph: fx.Graph, parts: Sequence[fx.Node], axis: TokenAxis) -> fx.Node:
    """Insert nodes that join token slices, in order, into the whole value."""
    if axis.outer == 1:
        return call(graph, torch.ops.aten.cat.default, (list(parts), axis.dim))
    wide = []
    for part in parts:
        shape = shape_of(part)
        rows = shape[axis.dim] // (axis.outer * axis.inner)
        unfolded = [*shape[: axis.dim], axis.outer, rows, axis.inner, *shape[axis.dim + 1 :]]
        wide.append(call(graph, torch.ops.aten.reshape.default, (part, unfolded)))
    whole = call(graph, torch.ops.aten.cat.default, (wide, axis.dim + 1))
    folded = list(shape_of(parts[0]))
    folded[axis.dim] = axis.outer * axis.tokens * axis.inner
    return call(graph, torch.ops.aten.reshape.default, (whole, folded))


def sliced_copy(
    graph: fx.Graph, node: fx.Node, info: TokenInfo, args: Mapping[fx.Node, fx.Node], lo: int, hi: int
) -> fx.Node:
    """Insert a copy of `node` that computes token rows [lo, hi) from `args`, its operands sliced or whole."""
    rows = info.axis.outer * (hi - lo) * info.axis.inner
    target: Any = node.target
    new_args: Any = fx.node.map_arg(node.args, lambda n: args[n])
    name = schema_name(node)
    if name in _VIEWS:
        sizes = list(shape_of(node))
        sizes[info.axis.dim] = rows
        target, new_args = torch.ops.aten.reshape.default, (new_args[0], sizes)
    elif name == "aten::expand":
        sizes = list(shape_of(node))
        sizes[info.axis.dim] = rows
        new_args = (new_args[0], sizes)
    elif name == "aten::slice" and shape_of(node) == shape_of(node.all_input_nodes[0]):
        return new_args[0]
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: args[n])
    copy = call(graph, target, new_args, kwargs)
    for key in ("stack_trace", "nn_module_stack", "original_aten", "from_node", "seq_nr"):
        if key in node.meta:
            copy.meta[key] = node.meta[key]
    return copy
