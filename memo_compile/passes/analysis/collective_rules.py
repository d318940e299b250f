"""What collectives do to the token axis: memo's own, of one node each, and torch's functional ones, start and wait.

Dimension 0 of what is gathered is the flattening of (ranks, rows of one rank): row t of rank r is row (r, t).
A functional collective takes its operand dense and whole, so that it runs whole, and its result is stored in slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.fx as fx

from memo_compile.passes.analysis.token_axis import (
    Flow,
    Rule,
    TokenAxis,
    fresh,
    of_first_operand,
    only,
    shape_of,
    wrapped,
)
from memo_compile.passes.fx.facts import schema_name


@of_first_operand
def _collective(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    """All-gather, reduce-scatter and all-reduce along dimension `dim`, the flattening of (ranks, rows of one rank)."""
    args: Any = node.args
    before, after = shape_of(source), shape_of(node)
    dim = wrapped(args[1], len(before)) if before != after else axis.dim
    if dim != axis.dim or before == after:
        return Flow((axis,), only(node, source, axis))
    outer, remainder = divmod(axis.outer * after[dim], before[dim])
    return (
        None
        if remainder or not outer
        else Flow((TokenAxis(dim=dim, outer=outer, tokens=axis.tokens, inner=axis.inner),), only(node, source, axis))
    )


@of_first_operand
def _shared_out(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    """A rank's share of what all hold: of tokens, these are new ones."""
    args: Any = node.args
    dim = wrapped(args[1], len(shape_of(source)))
    if dim != axis.dim:
        return Flow((axis,), only(node, source, axis))
    return fresh(node, axis)


@of_first_operand
def _among_ranks(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    """Rows of all ranks are gathered, or shared out. Of a sequence that is shared out a rank has other rows."""
    before, after = shape_of(source)[0], shape_of(node)[0]
    if axis.dim != 0:
        return Flow((axis,), only(node, source, axis), mixing=True)
    outer, remainder = divmod(axis.outer * after, before)
    if remainder or not outer:
        return fresh(node, TokenAxis(dim=0, outer=1, tokens=before, inner=1))
    return Flow(
        (TokenAxis(dim=0, outer=outer, tokens=axis.tokens, inner=axis.inner),), only(node, source, axis), mixing=True
    )


@of_first_operand
def _to_other_ranks(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    """An all-to-all, tokens for heads: what a rank gets has other places. Its rows are new ones."""
    return fresh(node, TokenAxis(dim=0, outer=1, tokens=shape_of(source)[0], inner=1))


@of_first_operand
def _reduced(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    """Each element is summed over ranks, at its own place."""
    return Flow((axis,), only(node, source, axis))


@of_first_operand
def _waited(node: fx.Node, source: fx.Node, axis: TokenAxis) -> Flow | None:
    """The wait belongs to its start, which runs whole."""
    return Flow((axis,), only(node, source, axis), mixing=schema_name(source) != "_c10d_functional::all_reduce")


COLLECTIVES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("memo_collectives::all_gather", "memo_collectives::reduce_scatter", "memo_collectives::all_reduce"),
        _collective,
    ),
    **dict.fromkeys(
        ("_c10d_functional::all_gather_into_tensor", "_c10d_functional::reduce_scatter_tensor"), _among_ranks
    ),
    "memo_collectives::shard": _shared_out,
    "_c10d_functional::all_to_all_single": _to_other_ranks,
    "_c10d_functional::all_reduce": _reduced,
    "_c10d_functional::wait_tensor": _waited,
}
