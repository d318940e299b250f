"""Corrects what a joint graph says of how its values lie in memory.

Where Inductor puts one pattern in the place of another, such as attention that is written out, the new nodes have the
values of the pattern's examples, which are dense, whatever the operands are (torch/_inductor/pattern_matcher.py,
`register_replacement`). Inductor works strides out again when it lowers a graph. memo reads them before: what may be
written over what, what bodies of tiles are compiled for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.build import call, fake_mode
from memo_compile.passes.fx.facts import has_tag, is_pure, is_random

_OF_NUMBERS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default})


def tell_true_layouts(gm: fx.GraphModule) -> fx.GraphModule:
    """Give each value the strides that its op makes of its operands; a view that these do not allow is of a copy."""
    with fake_mode(gm.graph), torch.no_grad():
        for node in list(gm.graph.nodes):
            if _is_worked_out(node):
                _correct(node)
    gm.recompile()
    return gm


def _is_worked_out(node: fx.Node) -> bool:
    """Whether an op's result is known by its operands' shapes and strides."""
    known = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and "val" in node.meta
    return known and is_pure(node) and not is_random(node) and not any(has_tag(node, tag) for tag in _OF_NUMBERS)


def _correct(node: fx.Node) -> None:
    try:
        value = _made(node)
    except (RuntimeError, ValueError):  # torch raises one or the other
        if node.target not in _VIEWS:
            return
        with node.graph.inserting_before(node):
            dense = {"memory_format": torch.contiguous_format}
            copy = call(node.graph, torch.ops.aten.clone.default, (node.args[0],), dense)
        node.replace_input_with(node.all_input_nodes[0], copy)
        value = _made(node)
    if _layout(value) != _layout(node.meta["val"]):
        node.meta["val"] = value


def _made(node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _layout(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_layout(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return None
    return [*map(str, (*value.shape, *value.stride(), value.storage_offset())), value.dtype]
