"""Seconds, FLOPs and bytes of nodes: torch's FLOP formulas, and a roofline with the device's efficiencies by size.

A node takes as long as the slower of its arithmetic and its memory traffic, and never less than a launch; a collective
as long as its bytes take on the link between devices. Causal attention is counted causally, as half the FLOPs; with a
mask, as all of them.

Where a compiler fuses, elementwise values that only elementwise ops and reductions read never reach memory: they cost
nothing, and who reads them reads what they were made from (`passes.analysis.liveness.reaches_memory`).
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.fx as fx

from memo_compile.hardware.profiles import DeviceProfile
from memo_compile.models.collectives import NAMESPACE
from memo_compile.passes.analysis.liveness import reaches_memory
from memo_compile.passes.fx.facts import MATMULS, is_view, nbytes, op_name, schema_name, schema_of, storage_of


@dataclass(frozen=True)
class Cost:
    """Seconds, floating-point operations, bytes read and written, bytes received from other devices."""

    seconds: float
    flops: float
    bytes: int
    link_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.link_bytes + other.link_bytes,
        )


FREE = Cost(0.0, 0.0, 0)

Timer = Callable[[fx.Node], float | None]


def graph_costs(
    gm: fx.GraphModule,
    profile: DeviceProfile,
    *,
    fused: bool = False,
    written: Collection[fx.Node] = (),
    timer: Timer | None = None,
) -> dict[str, Cost]:
    """The cost of each call in a graph, by name.

    Args:
        fused: whether a fusing compiler runs the graph.
        written: values that reach memory whoever reads them: in a joint graph, what is saved.
        timer: seconds of a node measured on a device, None where it does not know: `KernelTimer`.
    """
    kept = set(written)
    in_registers = {n for n in gm.graph.nodes if fused and n not in kept and not reaches_memory(n)}
    costs: dict[str, Cost] = {}
    read: dict[fx.Node, tuple[fx.Node, ...]] = {}  # what is in memory and must be read to have the value
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        sources: dict[fx.Node, None] = {}
        for argument in _operands(node):
            storage = storage_of(argument)
            sources.update(dict.fromkeys(read.get(storage, ()) if storage in in_registers else (storage,)))
        read[node] = tuple(sources)
        costs[node.name] = FREE if node in in_registers else _cost(node, read[node], profile, timer)
    return costs


def node_cost(node: fx.Node, profile: DeviceProfile) -> Cost:
    """The cost of one ATen-level node run alone. Views and bookkeeping cost nothing."""
    return _cost(node, _operands(node), profile, None)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs.

    >>> total([Cost(1.0, 2.0, 3), Cost(1.0, 0.0, 1)])
    Cost(seconds=2.0, flops=2.0, bytes=4, link_bytes=0)
    """
    return sum(costs, FREE)


def account(gm: fx.GraphModule, costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """The costs summed by op, the longest first. They add up to the total."""
    by_op: dict[str, Cost] = {}
    for node in gm.graph.nodes:
        if node.name in costs:
            by_op[op_name(node)] = by_op.get(op_name(node), FREE) + costs[node.name]
    return dict(sorted(by_op.items(), key=lambda item: (-item[1].seconds, item[0])))


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The values that a node reads; what it only waits for is not read."""
    if _is_collective(node):
        return tuple(a for a in node.args[:1] if isinstance(a, fx.Node))
    return tuple(node.all_input_nodes)


def _cost(node: fx.Node, reads: Collection[fx.Node], profile: DeviceProfile, timer: Timer | None) -> Cost:
    if node.op != "call_function" or node.target is operator.getitem or is_view(node) or _is_wait(node):
        return FREE
    moved = _written(node) + sum(nbytes(a) for a in reads)
    if _is_collective(node):
        received = _received(node)
        return Cost(received / (profile.link * profile.link_efficiency) + profile.launch_overhead, 0.0, moved, received)
    flops = node_flops(node)
    measured = timer(node) if timer is not None and flops else None
    if measured is not None:
        return Cost(measured, flops, moved)
    seconds = moved / (profile.memory_bandwidth * profile.memory_efficiency)
    if flops:
        seconds = max(seconds, flops / (profile.flops(_dtype(node)) * _share(node, profile, flops)))
    return Cost(seconds + profile.launch_overhead, flops, moved)


def _share(node: fx.Node, profile: DeviceProfile, flops: float) -> float:
    """The share of the peak that the node's kernel reaches, by its shapes."""
    if not is_attention(node):
        return profile.matmul_share(flops, _smallest_dimension(node))
    backward = "backward" in _name(node)
    query, *_ = _query_key_value(node, backward)
    heads = int(query.shape[0]) * int(query.shape[_heads_and_tokens(node)[0]])
    return profile.attention_share(flops, heads, backward=backward)


def _smallest_dimension(node: fx.Node) -> float:
    """Of (m, k) times (k, n), the least of m, k and n; no bound for what is no plain matmul."""
    if _name(node) not in MATMULS:
        return math.inf
    left, right = (a.meta["val"] for a in node.args[-2:] if isinstance(a, fx.Node))
    return min(int(left.shape[-2]), int(left.shape[-1]), int(right.shape[-1]))


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


def _name(node: fx.Node) -> str:
    """`aten::mm` and the like."""
    return schema_name(node) or str(node.target)


# Arithmetic.


def is_attention(node: fx.Node) -> bool:
    """Whether the node is a fused attention, forward or backward."""
    name = _name(node)
    return any(part in name for part in _ATTENTION)


_ATTENTION = (
    "scaled_dot_product",
    "flash_attention",
    "efficient_attention",
    "flex_attention",
    "attention_onto",
    "attention_backward_onto",
)


@cache
def _registry() -> dict[Any, Any]:
    from torch.utils.flop_counter import flop_registry  # loads torch

    return dict(flop_registry)


def node_flops(node: fx.Node) -> float:
    """Floating-point operations of a node: two for each multiplication of a matmul, and none for anything else."""
    target = node.target
    if is_attention(node):
        return _attention_flops(node)
    formula = _registry().get(target._overloadpacket if isinstance(target, torch._ops.OpOverload) else target)
    if formula is None:
        return 0.0
    args: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return float(formula(*args[0], **args[1], out_val=node.meta["val"]))


def _attention_flops(node: fx.Node) -> float:
    """Two matmuls forward, over head sizes d and e of keys and values; backward five, three over d and two over e.

    Each matmul is 2·batch·heads·queries·keys·size (torch.utils.flop_counter, `sdpa_flop_count`). Grouped queries share
    keys, and no FLOPs.
    """
    backward = "backward" in _name(node)
    query, key, value = _query_key_value(node, backward)
    heads, tokens = _heads_and_tokens(node)
    batch, queries, keys = query.shape[0], query.shape[tokens], key.shape[tokens]
    over_keys, over_values = (3, 2) if backward else (1, 1)
    sizes = over_keys * int(query.shape[3]) + over_values * int(value.shape[3])
    flops = 2.0 * int(batch) * int(query.shape[heads]) * int(queries) * int(keys) * sizes
    return flops / 2 if _causal(node) else flops


def _heads_and_tokens(node: fx.Node) -> tuple[int, int]:
    """The dimensions of a query that count them: two ops have heads after tokens."""
    tokens_first = _name(node).startswith(("aten::_flash_attention", "aten::_efficient_attention"))
    return (2, 1) if tokens_first else (1, 2)


def _query_key_value(node: fx.Node, backward: bool) -> list[Any]:
    schema = schema_of(node.target)
    names = [a.name for a in schema.arguments] if schema is not None else []
    places = [names.index(n) for n in ("query", "key", "value")] if "query" in names else [0, 1, 2]
    args: Any = node.args
    return [args[p].meta["val"] for p in places]


def _causal(node: fx.Node) -> bool:
    """Whether the op skips what lies after a query: by its own argument. A mask alone skips nothing."""
    schema = schema_of(node.target)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name in ("is_causal", "custom_mask_type"):
            given = node.args[i] if i < len(node.args) else argument.default_value
            return bool(node.kwargs.get(argument.name, given))
    return False


# Collectives: rings, in which each of r devices receives (r - 1) / r of the whole (Thakur et al. 2005), and in an
# all-to-all of what it has itself.


def _is_collective(node: fx.Node) -> bool:
    return _name(node).startswith((f"{NAMESPACE}::", "_c10d_functional::")) and not _is_wait(node)


def _is_wait(node: fx.Node) -> bool:
    return _name(node) == "_c10d_functional::wait_tensor"


def _received(node: fx.Node) -> int:
    """Bytes that each device receives."""
    source, result = _written(_operands(node)[0]), _written(node)
    name = _name(node)
    if "all_to_all" in name:
        ranks = len(node.args[1])  # type: ignore[arg-type]
        return int(source * (ranks - 1) / ranks)
    if "all_reduce" in name:
        ranks = next((a for a in node.args[1:] if isinstance(a, int)), 0)
        return int(2 * source * ((ranks - 1) / ranks if ranks else 1.0))
    return abs(source - result)


# Measured kernels.


class KernelTimer:
    """Times matmuls and attentions on a device, each combination of shapes once. For `graph_costs(timer=...)`."""

    def __init__(self, device: str, repeats: int = 3, largest: int = 2**32) -> None:
        """`largest`: bytes; an op that touches more is left to the roofline."""
        self.device, self.repeats, self.largest = torch.device(device), repeats, largest
        self.known: dict[Any, float | None] = {}

    def __call__(self, node: fx.Node) -> float | None:
        """Seconds of the op on random inputs of its shapes, the fastest of a few; None where it cannot be run."""
        if _written(node) + sum(_written(a) for a in node.all_input_nodes) > self.largest:
            return None
        key = (op_name(node), repr(fx.node.map_arg((node.args, node.kwargs), _signature)))
        if key not in self.known:
            self.known[key] = self._time(node)
        return self.known[key]

    def _time(self, node: fx.Node) -> float | None:
        values: Any = fx.node.map_arg((node.args, node.kwargs), self._real)
        target: Any = node.target
        best = math.inf
        try:
            with torch.no_grad():
                for _ in range(self.repeats + 1):
                    self._wait()
                    started = time.perf_counter()
                    target(*values[0], **values[1])
                    self._wait()
                    best = min(best, time.perf_counter() - started)
        except (RuntimeError, NotImplementedError):  # an op of another device, or one that wants particular values
            return None
        return best

    def _real(self, node: fx.Node) -> Any:
        fake = node.meta["val"]
        if not isinstance(fake, torch.Tensor):
            return fake
        real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=self.device)
        return real.normal_() if fake.is_floating_point() else real.zero_()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _signature(node: fx.Node) -> Any:
    value = node.meta["val"]
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value
