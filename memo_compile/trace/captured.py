"""What a graph that Dynamo captured has in it beside a forward.

Private torch APIs, tried with torch 2.11 (on CUDA) and 2.13: the names of the functions that Dynamo puts in a graph for
gradients, and the switches of compiled autograd.
"""

from __future__ import annotations

import torch.fx as fx

_GRADIENTS = frozenset({"_autograd_grad", "grad", "backward"})


def takes_gradients(gm: fx.GraphModule) -> bool:
    """Whether gradients are taken within the graph, or within what it calls."""
    return any(_takes_gradients(node) for node in _nodes(gm))


def _takes_gradients(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "backward"
    module = str(getattr(node.target, "__module__", ""))
    of_autograd = module.startswith(("torch.autograd", "torch._functorch"))
    return node.op == "call_function" and of_autograd and getattr(node.target, "__name__", "") in _GRADIENTS


def holds_planned_backward(gm: fx.GraphModule) -> bool:
    """Whether the graph has memo's own transfers in it: compiled autograd has captured a planned backward."""
    return any(getattr(node.target, "namespace", "") == "memo" for node in _nodes(gm))


def under_compiled_autograd() -> bool:
    """Whether compiled autograd will take the backward of what is compiled now."""
    from torch._dynamo import compiled_autograd, config  # loads Dynamo

    return bool(config.compiled_autograd or compiled_autograd.compiled_autograd_enabled)


def _nodes(gm: fx.GraphModule) -> list[fx.Node]:
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return [node for graph in graphs for node in graph.nodes]
