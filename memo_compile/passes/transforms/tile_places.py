"""Lets a region that runs tile by tile write rows of its results over those rows of its operands that it reads last.

A tile has read its rows of an operand before it writes those of a result. So where nothing else reads the operand any
more, and rows of both lie in the same bytes, no place is needed for the result. Of the gradient of a layer's output the
gradient of its input is made that way, and of the gradients of queries those of what they were made of.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.fx as fx

from memo_compile.passes.analysis.regions import Region, made_of
from memo_compile.passes.analysis.tile_rows import GRADIENTS_OF_ATTENTION
from memo_compile.passes.analysis.token_axis import TokenAxis, is_tensor
from memo_compile.passes.fx.facts import (
    MATMULS,
    is_dense,
    is_pointwise,
    is_read_from,
    is_view,
    nbytes,
    schema_name,
    storage_of,
)

Operand = tuple[fx.Node, TokenAxis | None]
Over = Mapping[fx.Node, Operand]
"""Of results, the operands over which they are written."""

NOWHERE: Over = MappingProxyType({})


def written_over(region: Region, operands: Sequence[Operand], first: fx.Node) -> Over:
    """Which results of a region may lie where its operands do, largest first; its call is to stand before `first`."""
    inside = {*region.nodes, *region.sums}
    free = [
        (node, axis)
        for node, axis in operands
        if axis is not None and _has_a_storage_alone(node, operands) and _is_read_last(node, inside, first)
    ]
    found: dict[fx.Node, Operand] = {}
    for result in sorted(region.results, key=nbytes, reverse=True):
        axis = region.rows[result].axis
        place = next((o for o in free if _same_rows(result, axis, *o)), None)
        if place is not None:
            found[result] = place
            free.remove(place)
    return found


def _has_a_storage_alone(node: fx.Node, operands: Sequence[Operand]) -> bool:
    """Whether a value fills what the graph has made for it, and a tile reads that in no second way."""
    root = storage_of(node)
    alone = sum(storage_of(n) is root for n, _ in operands) == 1
    return alone and _is_made_here(root) and is_tensor(root) and nbytes(root) == nbytes(node) and is_dense(node)


def _is_made_here(root: fx.Node) -> bool:
    """Whether a storage is one that plain ops allocate: no input, no item of several in one, nothing from the host."""
    if root.op != "call_function":
        return False
    if root.target is operator.getitem:
        made = root.args[0]
        return isinstance(made, fx.Node) and schema_name(made) in GRADIENTS_OF_ATTENTION
    plain = schema_name(root) in MATMULS or root.target is torch.ops.aten.empty.memory_format
    return plain or (is_pointwise(root) and not is_view(root))


def _is_read_last(node: fx.Node, inside: Collection[fx.Node], first: fx.Node) -> bool:
    """Whether all that reads what lies in a value's storage, beside the region, has run when its call does.

    What reads the region's results as well is moved after the call, and what reads its views of the operand reads what
    these are copied to, when results are written. Copies to the host go on beside other work.
    """
    if is_read_from(first, node, inside):
        return False
    readers = _readers(storage_of(node)) - set(inside)
    return not any(schema_name(r).startswith("memo::offload") for r in readers) and not made_of(inside) & readers


def _readers(root: fx.Node) -> set[fx.Node]:
    """All that reads a storage, views of it among them."""
    found, stack = set[fx.Node](), [root]
    while stack:
        new = set(stack.pop().users) - found
        found |= new
        stack += [n for n in new if storage_of(n) is root]
    return found


def _same_rows(result: fx.Node, axis: TokenAxis, operand: fx.Node, other: TokenAxis) -> bool:
    """Whether the rows of each token lie in the same bytes of two dense values that begin at the same place."""
    return _laid_out(result.meta["val"], axis) == _laid_out(operand.meta["val"], other)


def _laid_out(value: torch.Tensor, axis: TokenAxis) -> tuple[torch.device, torch.dtype, int, int, int]:
    """What there is of a dense value, and of a token's row in it: elements that lie together, tokens apart."""
    return value.device, value.dtype, value.numel(), axis.tokens, int(value.stride(axis.dim)) * axis.inner
