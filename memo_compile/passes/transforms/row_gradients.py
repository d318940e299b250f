"""Adds the gradient of an embedding's rows to a gradient of the whole table that is there.

A table that is the head as well (tied weights) has two gradients, each as large as it: that of the head is a product,
and that of the rows is zero but for the rows that were looked up. torch makes both, and their sum: three tables at
once, when little else is left. Here the rows are added to the first where it lies.

Not in low precision: rows that occur often would be rounded against the larger sum each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import MATMULS, nbytes, puts_into_zeros, readers_of, schema_name, storage_of
from memo_compile.passes.fx.meta import WHY

EXACT = frozenset({torch.float32, torch.float64})


@dataclass(frozen=True)
class _Sum:
    """`node` adds what `rows` puts into zeros to `table`."""

    node: fx.Node
    table: fx.Node
    rows: fx.Node


def add_rows_in_place(gm: fx.GraphModule) -> fx.GraphModule:
    """Add rows to the other term of a sum where that lies, where nothing else reads either."""
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)):
        found = _sum_of(node)
        if found is not None:
            _rewrite(found)
    gm.graph.lint()
    gm.recompile()
    return gm


def _sum_of(node: fx.Node) -> _Sum | None:
    a, b = node.args[:2]
    if node.kwargs or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    pairs = [_Sum(node, table, rows) for table, rows in ((a, b), (b, a)) if _read_once(rows)]
    return next((found for found in pairs if _can_take_rows(found.table, node)), None)


def _read_once(node: fx.Node) -> bool:
    """Whether a value is zeros into which rows are put, and one sum reads it."""
    return len(node.users) == 1 and puts_into_zeros(node)


def _can_take_rows(table: fx.Node, node: fx.Node) -> bool:
    """Whether a value alone lies in the place of a product or of tiles, as the sum would, and nothing reads it later.

    Of other ops Inductor may make no value of their own: a copy may be what it copies.
    """
    value, root, total = table.meta.get("val"), storage_of(table), node.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dtype not in EXACT or value.dtype != total.dtype:
        return False
    alike = value.shape == total.shape and value.stride() == total.stride() and nbytes(root) == nbytes(table)
    its_own = schema_name(root) in MATMULS or root.target is torch.ops.aten.empty.memory_format
    return its_own and alike and all(reader <= node for reader in readers_of(table))


def _rewrite(found: _Sum) -> None:
    graph, (_, mask, indices, values) = found.node.graph, found.rows.args
    assert isinstance(indices, (list, tuple))
    with graph.inserting_before(found.node):
        of_one = {"dtype": found.node.meta["val"].dtype, "device": found.node.meta["val"].device}
        zero = call(graph, torch.ops.aten.full.default, ([], 0), of_one)
        kept = call(graph, torch.ops.aten.where.self, (mask, values, zero))
        args: tuple[Any, ...] = (found.table, indices[0], kept)
        made = call(graph, torch.ops.memo.add_rows_.default, args)
    made.meta["eager_input_vals"] = (tuple(a.meta["val"] for a in args), {})
    made.meta[WHY] = "rows are added to the other gradient of their table, where it lies"
    found.node.replace_all_uses_with(found.table)
    zeros = found.rows.all_input_nodes[0]
    for node in (found.node, found.rows, zeros):
        if not node.users:
            graph.erase_node(node)
