"""Moves the waits of offloads in the forward to where the copies have ended.

`slices` leaves each offload where its slice is final, and its wait after the last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.fx as fx

from memo_compile.passes.fx.facts import nbytes, storage_of
from memo_compile.passes.transforms.transfers import SLACK, Room, begins_of, size_of


def schedule_offloads(
    forward: fx.GraphModule,
    seconds: Callable[[fx.Node], float],
    rate: float,
    *,
    overlap: bool = True,
    live: Sequence[int] = (),
    most: int = 0,
) -> fx.GraphModule:
    """Move each `offload_wait` to the first step at which its copy, one after another at `rate` bytes/s, has ended.

    Never before the last reader of the slice, after which `slices` has put it: until then nothing is gained. `live` are
    the bytes live at each node, `most` what the other graph of the step holds at most: a wait moves on by the slack as
    long as clearly less than the most of all is then live; without `live`, there is no slack. With `overlap=False` a
    wait moves only as far as there is such room: what matters is the least memory, and a graph has little of it where
    the other one sets the peak.
    """
    nodes = list(forward.graph.nodes)
    begins = begins_of(nodes, seconds)
    position = {n: i for i, n in enumerate(nodes)}
    room = Room(live, most)
    slack = SLACK * begins[nodes[-1]]
    busy_until = 0.0
    ends: dict[tuple[fx.Node, int], float] = {}
    for node in nodes:
        if node.target is torch.ops.memo.offload.default:
            busy_until = max(busy_until, begins[node]) + size_of(node.args[0]) / rate
            ends[node.args[1], node.args[2]] = busy_until
    last = len(nodes) - 1
    for node in nodes:
        if node.target is torch.ops.memo.offload_wait.default:
            done, size = ends[node.args[1], node.args[2]], nbytes(storage_of(node.args[0]))
            at = next((i for i in range(position[node] + 1, last) if begins[nodes[i]] >= done), last)
            if not overlap:
                at = next((i for i in range(position[node] + 1, at) if not room.has(size, i)), at)
            room.hold(size, position[node] + 1, at)
            while overlap and at < last and begins[nodes[at]] < done + slack and room.has(size, at):
                room.hold(size, at, at + 1)
                at += 1
            nodes[at].prepend(node)
    forward.recompile()
    return forward
