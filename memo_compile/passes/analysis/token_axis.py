"""The token axis of a value, how it goes through views and broadcasting, and what a rule for an op answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
import torch.fx as fx


@dataclass(frozen=True)
class TokenAxis:
    """Dimension `dim` of a value is the flattening of (outer, tokens, inner): token t is the rows [o, t, i].

    In a graph for a range of lengths the numbers are those at its upper end, and `length` is the symbolic number of
    tokens; None where it is no symbol.
    """

    dim: int
    outer: int
    tokens: int
    inner: int
    length: Any = field(default=None, compare=False)

    def at(self, dim: int) -> TokenAxis:
        """The same axis at another dimension."""
        return replace(self, dim=dim)


@dataclass(frozen=True)
class Flow:
    """A rule's answer. `needs[i]` is the axis along which the i-th input node must be sliced, None: needed whole.

    `outputs` are the axes of the op's results, one for an op with one. `mixing` says that rows of the output depend on
    other rows of the operands: the axis then only says how the result can be stored in slices.
    """

    outputs: tuple[TokenAxis | None, ...]
    needs: tuple[TokenAxis | None, ...]
    mixing: bool = False


Axes = Mapping[fx.Node, TokenAxis]
Rule = Callable[[fx.Node, Axes], Flow | None]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The static shape of a node's tensor."""
    return tuple(int(s) for s in node.meta["val"].shape)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node has one tensor for its value."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def wrapped(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0


def through_view(shape: Sequence[int], axis: TokenAxis, out_shape: Sequence[int]) -> TokenAxis | None:
    """The axis after a view from `shape` to `out_shape`; None where no dimension holds the token factor whole.

    >>> through_view((3, 8, 4), TokenAxis(1, 1, 8, 1), (24, 4))
    TokenAxis(dim=0, outer=3, tokens=8, inner=1, length=None)
    >>> through_view((24, 4), TokenAxis(0, 3, 8, 1), (3, 2, 4, 4)) is None
    True
    """
    before = math.prod(shape[: axis.dim]) * axis.outer
    passed = 1
    for dim, size in enumerate(out_shape):
        if passed <= before and before % passed == 0 and size > 1:
            outer = before // passed
            if size % (outer * axis.tokens) == 0:
                return TokenAxis(dim=dim, outer=outer, tokens=axis.tokens, inner=size // (outer * axis.tokens))
        passed *= size
    return None


def need_of(operand: fx.Node, out_rank: int, axis: TokenAxis) -> TokenAxis | None:
    """What a broadcasting op needs of an operand for rows of its output: the aligned dimension, or all of it."""
    if not is_tensor(operand):
        return None
    shape = shape_of(operand)
    dim = axis.dim - (out_rank - len(shape))
    if dim < 0 or shape[dim] == 1:
        return None
    return axis.at(dim)


def of_first_operand(rule: Callable[[fx.Node, fx.Node, TokenAxis], Flow | None]) -> Rule:
    """A rule for ops whose rows follow those of their first operand, given with its axis; no axis, no flow."""

    @wraps(rule)
    def asked(node: fx.Node, axes: Axes) -> Flow | None:
        source = node.args[0]
        return rule(node, source, axes[source]) if isinstance(source, fx.Node) and source in axes else None

    return asked


def only(node: fx.Node, source: fx.Node, need: TokenAxis) -> tuple[TokenAxis | None, ...]:
    """Needs of a node that slices one operand, and takes the others whole."""
    return tuple(need if n is source else None for n in node.all_input_nodes)


def fresh(node: fx.Node, axis: TokenAxis) -> Flow | None:
    """Rows were dropped or added: this op runs whole, and its result can be sliced along the new rows."""
    tokens = shape_of(node)[axis.dim]
    if axis.outer != 1 or axis.inner != 1 or tokens < 2:
        return None
    return Flow(
        (TokenAxis(dim=axis.dim, outer=1, tokens=tokens, inner=1),), (None,) * len(node.all_input_nodes), mixing=True
    )
