"""Inserts nodes, with the fake values that the passes read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.multiprocessing.reductions import StorageWeakRef

from memo_compile.passes.fx.ranges import as_argument


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """Insert a call and compute its fake value. Sizes that are symbols are computed by nodes of their own."""
    args, kwargs = fx.node.map_aggregate((args, kwargs or {}), lambda a: as_argument(graph, a))
    node = graph.call_function(target, args, kwargs)
    values: Any = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with fake_mode(graph), torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    return node


def reshape(graph: fx.Graph, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
    """Insert a value in another shape: a view where its strides allow one, else that of a dense copy.

    The copy is a node of its own, so that it counts as one: `reshape` does not say whether it copies.
    """
    shaped = call(graph, torch.ops.aten.reshape.default, (node, list(sizes)))
    if _storage(shaped) != _storage(node):
        with graph.inserting_before(shaped):
            contiguous = {"memory_format": torch.contiguous_format}
            shaped.replace_input_with(node, call(graph, torch.ops.aten.clone.default, (node,), contiguous))
    return shaped


ORIGIN = ("stack_trace", "nn_module_stack", "original_aten", "from_node", "seq_nr")


def told(made: fx.Node, node: fx.Node) -> fx.Node:
    """`made`, which stands for `node`, and so comes from the same line."""
    made.meta.update({key: node.meta[key] for key in ORIGIN if key in node.meta})
    return made


def _storage(node: fx.Node) -> StorageWeakRef:
    return StorageWeakRef(node.meta["val"].untyped_storage())


def fake_mode(graph: fx.Graph) -> Any:
    """The fake tensor mode that a graph was traced with."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    raise AssertionError("a graph without fake tensors")
