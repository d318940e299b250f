"""Ops that add up over tokens, beside those that tiles add up (`tile_rows`): the operands of which rows are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.fx as fx

from memo_compile.passes.analysis.token_axis import TokenAxis, shape_of
from memo_compile.passes.fx.facts import schema_name

Needs = dict[fx.Node, TokenAxis]
AxisOf = Callable[[fx.Node], "TokenAxis | None"]


def is_mean(node: fx.Node) -> bool:
    return schema_name(node) == "aten::mean"


def _mean(node: fx.Node, axis_of: AxisOf) -> Needs | None:
    args: Any = node.args
    source = args[0]
    axis, rank = axis_of(source), len(shape_of(source))
    over = {d % rank for d in args[1]} if len(args) > 1 and args[1] else set(range(rank))
    return {source: axis} if axis is not None and axis.dim in over else None


def _embedding(node: fx.Node, axis_of: AxisOf) -> Needs | None:
    gradient, indices = node.all_input_nodes[:2]
    axis = axis_of(gradient)
    return {gradient: axis, indices: axis} if axis is not None else None


def _put(node: fx.Node, axis_of: AxisOf) -> Needs | None:
    """Inductor's gradient of an embedding: rows are added to zeros, each at one index."""
    args: Any = node.args
    base, indices, rows, *accumulate = args
    axis = axis_of(rows)
    zeros = isinstance(base, fx.Node) and schema_name(base) == "aten::full" and not base.args[1]
    if axis is None or len(indices) != 1 or accumulate != [True] or not zeros:
        return None
    return {rows: axis, indices[0]: axis} if axis.dim < len(shape_of(indices[0])) else None


def _masked_put(node: fx.Node, axis_of: AxisOf) -> Needs | None:
    """The same, of rows that a mask chooses."""
    args: Any = node.args
    base, mask, indices, rows = args
    axis = axis_of(rows)
    zeros = isinstance(base, fx.Node) and schema_name(base) == "aten::full" and not base.args[1]
    places = (mask, *indices)
    if axis is None or not zeros or len(indices) != 1 or any(len(shape_of(n)) <= axis.dim for n in places):
        return None
    return {rows: axis, **{n: axis for n in places if shape_of(n)[axis.dim] > 1}}


SUMS: Mapping[str, Callable[[fx.Node, AxisOf], Needs | None]] = {
    "aten::mean": _mean,
    "aten::embedding_dense_backward": _embedding,
    "aten::index_put": _put,
    "aten::_unsafe_index_put": _put,
    "aten::_unsafe_masked_index_put_accumulate": _masked_put,
}
