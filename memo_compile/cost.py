"""Seconds, FLOPs and bytes of one node: torch's FLOP formulas and a roofline.

A node takes as long as the slower of its arithmetic and its memory traffic, and never less than a launch. Causal
attention is counted causally: half the products.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.fx as fx

from memo_compile.hardware import DeviceProfile
from memo_compile.passes.graph import is_view, nbytes


@dataclass(frozen=True)
class Cost:
    """Seconds, floating-point operations, and bytes read and written."""

    seconds: float
    flops: float
    bytes: int


FREE = Cost(0.0, 0.0, 0)


def node_cost(node: fx.Node, profile: DeviceProfile) -> Cost:
    """The cost of one ATen-level node with fake values in `meta["val"]`. Views and bookkeeping cost nothing."""
    if node.op != "call_function" or node.target is operator.getitem or is_view(node):
        return FREE
    flops = _flops(node)
    moved = _written(node) + sum(nbytes(a) for a in node.all_input_nodes)
    seconds = moved / profile.memory_bandwidth
    if flops:
        efficiency = profile.attention_efficiency if _is_attention(node) else profile.matmul_efficiency
        # Small products reach less of the peak: half of it at `half_size` FLOPs.
        efficiency *= flops / (flops + profile.half_size)
        seconds = max(seconds, flops / (profile.flops(_dtype(node)) * efficiency))
    return Cost(seconds + profile.launch_overhead, flops, moved)


def _written(node: fx.Node) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def _dtype(node: fx.Node) -> str:
    for a in node.all_input_nodes:
        value = a.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return str(value.dtype).removeprefix("torch.")
    return "float32"


def _is_attention(node: fx.Node) -> bool:
    return "scaled_dot_product" in str(node.target) or "flash_attention" in str(node.target)


@cache
def _registry() -> dict[Any, Any]:
    from torch.utils.flop_counter import flop_registry

    return dict(flop_registry)


def _flops(node: fx.Node) -> float:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0.0
    if "flash_attention_for_cpu" in target._schema.name:
        return _attention_flops(node, backward="backward" in target._schema.name)
    formula = _registry().get(target._overloadpacket)
    if formula is None:
        return 0.0
    args: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    flops = float(formula(*args[0], **args[1], out_val=node.meta["val"]))
    return flops / 2 if _is_attention(node) and _causal(node) else flops


def _attention_flops(node: fx.Node, *, backward: bool) -> float:
    """Two products forward, five backward, of 2·B·H·S·S·D each (torch.utils.flop_counter, sdpa_flop_count)."""
    args: Any = node.args
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    b, h, s, d = (int(x) for x in query.meta["val"].shape)
    t = int(key.meta["val"].shape[2])
    flops = 2.0 * b * h * s * t * d * (5 if backward else 2)
    return flops / 2 if _causal(node) else flops


def _causal(node: fx.Node) -> bool:
    """Whether the op's `is_causal` argument is set, wherever it stands."""
    schema = node.target._schema  # type: ignore[union-attr]
    for i, argument in enumerate(schema.arguments):
        if argument.name == "is_causal":
            return bool(node.kwargs.get("is_causal", node.args[i] if i < len(node.args) else False))
    return False
