"""Puts transfers where they belong in the order: waits as late, prefetches as early as the links need.

`slices` leaves each offload where its slice is final, its wait behind the last reader, and each slice that comes back as
a mark where it is first needed. Here the marks become a landing buffer, the start of its prefetch and a wait, and the
waits of offloads move to where the copy has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.fx as fx

from memo_compile.passes.provenance import FOR, WHY
from memo_compile.passes.slices import fetch


def schedule_offloads(
    forward: fx.GraphModule, seconds: Callable[[fx.Node], float], rate: float, *, ahead: bool = True
) -> fx.GraphModule:
    """Move each `offload_wait` to the first step at which its copy, one after another at `rate` bytes/s, has ended.

    Never before the last reader of the slice, behind which `slices` has put it: until then nothing is gained. With
    `ahead=False` the waits stay there: the least memory, and no overlap.
    """
    if not ahead:
        return forward
    nodes = list(forward.graph.nodes)
    begins = dict(zip(nodes, itertools.accumulate([seconds(n) for n in nodes], initial=0.0), strict=False))
    position = {n: i for i, n in enumerate(nodes)}
    busy_until = 0.0
    ends: dict[tuple[fx.Node, int], float] = {}
    for node in nodes:
        if node.target is torch.ops.memo.offload.default:
            busy_until = max(busy_until, begins[node]) + _bytes(node.args[0]) / rate
            ends[node.args[1], node.args[2]] = busy_until
    output = nodes[-1]
    for node in nodes:
        if node.target is torch.ops.memo.offload_wait.default:
            done = ends[node.args[1], node.args[2]]
            later = (n for n in nodes[position[node] + 1 :] if begins[n] >= done)
            next(later, output).prepend(node)
    forward.recompile()
    return forward


def schedule_prefetches(
    backward: fx.GraphModule, seconds: Callable[[fx.Node], float], rate: float, *, ahead: bool = True
) -> fx.GraphModule:
    """Replace each fetch mark by a landing buffer, a prefetch that starts early enough at `rate` bytes/s, and a wait.

    With `ahead=False` a prefetch starts where it is needed: the least memory, and no overlap.
    """
    graph = backward.graph
    nodes = list(graph.nodes)
    begins = dict(zip(nodes, itertools.accumulate([seconds(n) for n in nodes], initial=0.0), strict=False))
    first = next(i for i, n in enumerate(nodes) if n.op != "placeholder")
    engine_free = float("inf")
    for index in range(len(nodes) - 1, -1, -1):
        mark = nodes[index]
        if mark.target is not fetch:
            continue
        start = index
        if ahead:
            engine_free = min(begins[mark], engine_free) - _bytes(mark) / rate
            while start > first and begins[nodes[start]] > engine_free:
                start -= 1
        _lower(graph, mark, nodes[start])
    backward.recompile()
    return backward


def _lower(graph: fx.Graph, mark: fx.Node, start: fx.Node) -> None:
    lease, offset, _, dtype = mark.args
    why, value_of = mark.meta.get(WHY, ""), mark.meta.get(FOR, "")
    value: torch.Tensor = mark.meta["val"]
    with graph.inserting_before(start):
        landing = graph.call_function(
            torch.ops.aten.empty.memory_format, (list(value.shape),), {"dtype": dtype, "device": value.device}
        )
        landing.meta.update({"val": value, WHY: f"where they land: {why}", FOR: value_of})
        prefetch = graph.call_function(torch.ops.memo.prefetch_.default, (landing, lease, offset))
        prefetch.meta.update({"val": None, WHY: f"the copy starts, early enough for the link: {why}", FOR: value_of})
    with graph.inserting_before(mark):
        wait = graph.call_function(torch.ops.memo.wait_.default, (landing, lease, offset))
        wait.meta.update({"val": None, WHY: f"the copy must have ended: {why}", FOR: value_of})
    mark.replace_all_uses_with(landing)
    graph.erase_node(mark)


def _bytes(node: fx.Node) -> int:
    value: torch.Tensor = node.meta["val"]
    return value.numel() * value.element_size()
