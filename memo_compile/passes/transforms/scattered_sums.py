"""Puts each term of a sum into a small table by itself, where the sum is much larger than the table.

The table of T5's position bias has a few hundred numbers, and one for each pair of tokens is looked up. All layers add
the same bias to their scores, so that its gradient is a sum of one value of tokens x tokens a layer, put into the table
at the end: each such value lies there until the next layer has made its own. Putting a value into a table is linear:
here each layer's is put into a table when it comes, and the small tables are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import is_tensor
from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import PUT, is_cheap, is_view, nbytes, puts_into_zeros
from memo_compile.passes.fx.provenance import provenance

SMALLER = 32  # by this factor a table is, at least
LARGE = 2**20  # bytes of what is put there


def put_each_term(gm: fx.GraphModule) -> fx.GraphModule:
    """Put the terms of sums into tables one by one."""
    waiting = [n for n in gm.graph.find_nodes(op="call_function", target=PUT) if puts_into_zeros(n)]
    while waiting:
        waiting += _divided(gm, waiting.pop())
    gm.graph.lint()
    gm.recompile()
    return gm


def _divided(gm: fx.GraphModule, put: fx.Node) -> list[fx.Node]:
    """Two in the place of one that puts a sum into a table, or none."""
    values = put.args[3]
    if not isinstance(values, fx.Node) or nbytes(values) < max(LARGE, SMALLER * nbytes(put)):
        return []
    total, views = _behind_views(values)
    if total is None or not _adds_alike(total):
        return []
    with provenance(gm, "each term of a sum is put into its table when it comes"):
        parts = [_put_of(put, term, views) for term in total.args[:2] if isinstance(term, fx.Node)]
        with gm.graph.inserting_before(put):
            made = call(gm.graph, torch.ops.aten.add.Tensor, tuple(parts))
    put.replace_all_uses_with(made)
    for node in (put, *reversed(views), total):
        gm.graph.erase_node(node)
    return parts


def _behind_views(values: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """What is put, before the views of it that nothing else reads, and those, the first one first."""
    views: list[fx.Node] = []
    node = values
    while len(node.users) == 1:
        source = node.args[0] if node.args else None
        if not is_view(node) or not isinstance(source, fx.Node):
            return node, views[::-1]
        views.append(node)
        node = source
    return None, []


def _adds_alike(node: fx.Node) -> bool:
    """Whether a node adds two tensors of its own shape and dtype, each once."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return False
    values = [n.meta["val"] for n in (node, *node.args) if isinstance(n, fx.Node) and is_tensor(n)]
    return len(values) == 3 and all(_layout(v) == _layout(values[0]) for v in values)


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype


def _put_of(put: fx.Node, term: fx.Node, views: Sequence[fx.Node]) -> fx.Node:
    """The same of one term, as early as its operands are there."""
    graph, values = put.graph, put.args[3]
    late = _late([n for n in put.all_input_nodes if n is not values], term)
    # torch works out which rows are meant where it puts them in: each term has that done by itself.
    copied = all(is_cheap(n) or n.target is torch.ops.aten.full.default for n in late)
    after = term if copied else max([term, *late])
    given: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(after.next):
        for node in sorted(late) if copied else ():
            given[node] = graph.node_copy(node, lambda n: given.get(n, n))
        value = term
        for view in views:
            value = call(graph, view.target, (value, *view.args[1:]), dict(view.kwargs))
        args: Any = fx.node.map_arg(put.args[:3], lambda n: given.get(n, n))
        return call(graph, put.target, (*args, value))


def _late(operands: Sequence[fx.Node], term: fx.Node) -> set[fx.Node]:
    """What stands after `term` of all that `operands` are made of."""
    late, stack = set[fx.Node](), [n for n in operands if n > term]
    while stack:
        node = stack.pop()
        late.add(node)
        stack += [n for n in node.all_input_nodes if n > term and n not in late]
    return late
