"""Placement in two levels: one layer's transients once, then the layers as blocks, then the whole.

A layer's transients are those of its buffers that are born and dead between its first and its last step. Where many
layers have the same transients at the same steps, counted from the layer's first, one copy is placed; its peak over
time makes one block a layer, and the whole is placed with blocks in place of transients. Blocks cannot do better than
every buffer alone, so the answer is compared with the lower bound of all, and where it is worse than that by more than
`SLACK`, everything is placed flat.

MEMO (arXiv 2407.12117) places one transformer layer in this way.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from memo_compile.placement.bounds import lower_bound
from memo_compile.placement.problem import Buffer, Placement, aligned, check, check_limits
from memo_compile.placement.solve import place
from memo_compile.placement.verifier import verify

SLACK = 0.0005  # of the lower bound: by how much two levels may be worse than what flat placement could reach
BLOCK = "block of layer "

Shape = tuple[tuple[int, int, int], ...]


def place_layers(
    buffers: Sequence[Buffer],
    layer_of: Mapping[str, int],
    *,
    alignment: int = 1,
    capacity: int | None = None,
    time_limit: float = 10.0,
    work: int | None = None,
) -> Placement:
    """Place buffers of which some belong to layers that repeat.

    Args:
        buffers: what to place, without aliases or preferences among the transients of layers.
        layer_of: by name, the layer of those buffers that belong to one; a layer's buffers should be live within a
            range of steps of its own. Names that are not there belong to none.
        alignment: every offset is a multiple of it.
        capacity: stop at a placement that fits, as `place` does.
        time_limit: seconds, for all of it.
        work: the most nodes of search for each placement.

    Raises:
        InvalidBuffer: a buffer that cannot be.
        InvalidOption: an alignment, capacity, time limit or work that cannot be.

    >>> twice = [Buffer("a0", 4, 0, 2), Buffer("b0", 2, 1, 3), Buffer("a1", 4, 3, 5), Buffer("b1", 2, 4, 6)]
    >>> answer = place_layers(twice, {"a0": 0, "b0": 0, "a1": 1, "b1": 1})
    >>> answer.peak, answer.offsets["a0"] == answer.offsets["a1"]
    (6, True)
    """
    started = time.perf_counter()
    buffers = list(buffers)
    check_limits(alignment, capacity, time_limit, work)
    check(buffers, alignment)
    groups = _repeating(buffers, layer_of, alignment)
    bound = lower_bound(buffers, alignment)
    if groups:
        answer = _two_levels(buffers, groups, alignment, bound, time_limit / 2, work)
        if answer is not None and (capacity is None or answer.peak <= capacity):
            verify(buffers, answer, alignment=alignment)
            return replace(answer, seconds=time.perf_counter() - started)
    remaining = max(0.0, time_limit - (time.perf_counter() - started))
    answer = place(buffers, alignment=alignment, capacity=capacity, time_limit=remaining, work=work)
    return replace(answer, seconds=time.perf_counter() - started)


def _repeating(
    buffers: Sequence[Buffer], layer_of: Mapping[str, int], alignment: int
) -> list[list[tuple[Buffer, ...]]]:
    """Groups of layers with equal transients, two layers or more, each layer's in one order."""
    layers: dict[int, list[Buffer]] = defaultdict(list)
    for b in buffers:
        if b.name in layer_of and b.alias is None and b.prefer == "any" and b.size > 0:
            layers[layer_of[b.name]].append(b)
    aliased = {b.alias for b in buffers}
    alike: dict[Shape, list[tuple[Buffer, ...]]] = defaultdict(list)
    for members in layers.values():
        group = sorted((b for b in members if b.name not in aliased), key=lambda b: (b.start, b.end, b.size, b.name))
        if len(group) > 1:
            first = group[0].start
            shape = tuple((b.start - first, b.end - first, aligned(b.size, alignment)) for b in group)
            alike[shape].append(tuple(group))
    return [group for group in alike.values() if len(group) > 1]


def _two_levels(
    buffers: Sequence[Buffer],
    groups: Sequence[Sequence[tuple[Buffer, ...]]],
    alignment: int,
    bound: int,
    time_limit: float,
    work: int | None,
) -> Placement | None:
    """None where blocks cost too much against the lower bound of all."""
    ends = time.perf_counter() + time_limit
    inner: dict[str, int] = {}
    block_of: dict[str, str] = {}
    blocks: list[Buffer] = []
    for layers in groups:
        remaining = max(0.0, ends - time.perf_counter())
        one = place(layers[0], alignment=alignment, time_limit=remaining / 4, work=work)
        for layer in layers:
            block = Buffer(f"{BLOCK}{len(blocks)}", one.peak, min(b.start for b in layer), max(b.end for b in layer))
            blocks.append(block)
            for copy, original in zip(layer, layers[0], strict=True):
                inner[copy.name], block_of[copy.name] = one.offsets[original.name], block.name
    outer = [b for b in buffers if b.name not in block_of] + blocks
    if lower_bound(outer, alignment) > (1 + SLACK) * bound:
        return None
    remaining = max(0.0, ends - time.perf_counter())
    whole = place(outer, alignment=alignment, capacity=int((1 + SLACK) * bound), time_limit=remaining, work=work)
    if whole.peak > (1 + SLACK) * bound:
        return None
    offsets = {
        b.name: whole.offsets[block_of[b.name]] + inner[b.name] if b.name in block_of else whole.offsets[b.name]
        for b in buffers
    }
    return Placement(
        offsets=offsets,
        peak=whole.peak,
        lower_bound=bound,
        proved_optimal=whole.peak == bound,
        solver=f"two levels, {whole.solver}",
        seconds=0.0,
    )
