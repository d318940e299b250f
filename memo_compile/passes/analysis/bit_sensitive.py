"""Values that must not be recomputed, since something is decided by their last bits.

A matmul of a slice, or a sum in another kernel, differs from the first in its last bits. A gradient does too then, and
no more, unless it depends on which of two values is greater, or on whether they are the same: the gradient of a maximum
goes to where `x == x.max()`, and to nowhere if that is nowhere. torch's own checkpoints run the same kernels again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx as fx

from memo_compile.passes.fx.facts import is_random

_aten = torch.ops.aten
# By packet, so that every overload counts.
_DECISIONS = (
    *(_aten.eq, _aten.ne, _aten.argmax, _aten.argmin, _aten.topk, _aten.sort, _aten.argsort, _aten.kthvalue),
    *(_aten.mode, _aten.median, _aten.nanmedian, _aten.searchsorted, _aten.bucketize, _aten.nonzero, _aten.cummax),
    *(_aten.cummin, _aten.floor, _aten.ceil, _aten.round, _aten.trunc, _aten.fmod, _aten.remainder, _aten.floor_divide),
)
_BETWEEN_TENSORS = tuple(getattr(_aten, name).Tensor for name in ("gt", "ge", "lt", "le"))
_WITH_PLACES = (_aten.max.dim, _aten.min.dim)
_CASTS = (torch.ops.prims.convert_element_type.default, _aten._to_copy.default)  # to whole numbers: these truncate
# Of a difference that may be exactly zero. Of anything else a value as close to the constant is rare, as in ReLU.
_OF_A_DIFFERENCE = (
    *(getattr(_aten, name).Scalar for name in ("gt", "ge", "lt", "le")),
    *(_aten.sign.default, _aten.sgn.default, _aten.heaviside.default, _aten.threshold_backward.default),
)


def decides(node: fx.Node) -> bool:
    """Whether what a node makes of floating-point numbers can change by more than they do."""
    packet = getattr(node.target, "overloadpacket", None)
    if node.target in _OF_A_DIFFERENCE:
        return any(_is_difference(n) for n in node.all_input_nodes)
    if node.target in _CASTS:
        return not _is_floating(node) and any(_is_floating(n) and _is_of_data(n) for n in node.all_input_nodes)
    if packet not in _DECISIONS and node.target not in _BETWEEN_TENSORS + _WITH_PLACES:
        return False
    return any(_is_floating(n) for n in node.all_input_nodes)


def _is_of_data(node: fx.Node) -> bool:
    """Whether anything but constants is in a value."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op != "call_function" or is_random(current):
            return True
        stack += [n for n in current.all_input_nodes if n not in seen]
        seen.update(stack)
    return False


def _is_difference(node: fx.Node) -> bool:
    """Whether a value comes from a difference of two, by ops of one value each."""
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.target in (_aten.sub.Tensor, _aten.rsub.Tensor) and all(map(_is_floating, node.all_input_nodes))


def deciding(backward: fx.GraphModule) -> frozenset[str]:
    """Names of a backward's inputs on which it decides something."""
    stack = [source for n in backward.graph.nodes if decides(n) for source in n.all_input_nodes if _is_floating(source)]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return frozenset(n.name for n in seen if n.op == "placeholder")


def any_decides(chain: Iterable[fx.Node]) -> bool:
    """Whether something would be decided once more where a chain runs again."""
    return any(decides(node) for node in chain)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
