"""Inserts nodes, with the fake values that the passes read."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.ranges import as_argument


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """Insert a call and compute its fake value. Sizes that are symbols are computed by nodes of their own."""
    args, kwargs = fx.node.map_aggregate((args, kwargs or {}), lambda a: as_argument(graph, a))
    node = graph.call_function(target, args, kwargs)
    values: Any = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with fake_mode(graph), torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    return node


def fake_mode(graph: fx.Graph) -> Any:
    """The fake tensor mode that a graph was traced with."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    raise AssertionError("a graph without fake tensors")
