"""Places what a plan holds where there is no emitted code: from live ranges as traced, and slices as they travel.

Every byte that the linear program counts gets an offset: transients, results, rows of activations that stay, and rows
that leave until their copy has ended or are back from when it begins. As in the program, rows of one activation need
not lie together, and a gradient counts in the step that makes it. Transients of layers that repeat are placed once.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from memo_compile.codegen.arena.layout import ALIGNMENT
from memo_compile.forecast.repeat_layers import Long, repeated_ranges
from memo_compile.passes.analysis.liveness import LiveRange, lifetimes
from memo_compile.passes.fx.facts import storage_of
from memo_compile.passes.fx.meta import LAYER
from memo_compile.passes.transforms.residency import Residency
from memo_compile.placement import Buffer, place_layers
from memo_compile.placement.bounds import lower_bound
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.residency import Problem
from memo_compile.planning.simulate import RECOMPUTE, Simulation, Stream, simulate

GOOD_ENOUGH = 0.001  # of the lower bound: a forecast needs no better


@dataclass(frozen=True)
class OfflineArena:
    """Bytes of one arena for all that a plan holds, beside the most that is live at once; and how it was placed."""

    bytes: int
    lower_bound: int
    buffers: int
    solver: str
    seconds: float


def offline_arena(
    p: Prepared, long: Long, problem: Problem, residency: Mapping[str, Residency], *, time_limit: float = 10.0
) -> OfflineArena:
    """Place what is held under a residency.

    Args:
        p: the trace.
        long: its view with all layers; `problem` is made from it.
        residency: by the names of `problem.activations`.
        time_limit: seconds of placement.
    """
    started = time.perf_counter()
    transients, layer_of = transient_buffers(p, long)
    buffers = transients + list(row_buffers(problem, residency, simulate(problem, residency)))
    enough = int((1 + GOOD_ENOUGH) * lower_bound(buffers, ALIGNMENT))
    answer = place_layers(buffers, layer_of, alignment=ALIGNMENT, capacity=enough, time_limit=time_limit)
    seconds = time.perf_counter() - started
    return OfflineArena(answer.peak, answer.lower_bound, len(buffers), answer.solver, seconds)


def transient_buffers(p: Prepared, long: Long) -> tuple[list[Buffer], dict[str, int]]:
    """All that no plan moves, on the long timeline; and by name the layer of what is born and dead within one.

    The forward and the backward of a layer count as two.
    """
    total, middle = len(long.view.problem.seconds), long.period.layer if long.period else 0
    infos = {n.name: n.meta[LAYER].index for n in p.joint.graph.nodes if LAYER in n.meta}
    last = _last_steps(p, infos)
    buffers, layer_of = [], {}
    for name, r, backward in _ranges(p, frozenset(long.template.values())):
        copies = repeated_ranges(r.start, r.end, long.period) if long.period else [(0, r.start, r.end)]
        layer = infos.get(name)
        for copy, start, end in copies:
            b = Buffer(f"{name}+{copy}{'b' if backward else 'f'}", r.bytes, start, min(end, total))
            buffers.append(b)
            if layer is not None and r.end <= last[backward, layer] + 1:
                beyond = long.period.extra if long.period and layer > middle else copy
                layer_of[b.name] = 2 * (layer + beyond) + backward
    return buffers, layer_of


def _last_steps(p: Prepared, infos: Mapping[str, int]) -> dict[tuple[bool, int], int]:
    """The last step of each layer in the forward (False) and in the backward (True)."""
    front = list(p.forward.graph.nodes)
    forward = {n.name for n in front}
    last: dict[tuple[bool, int], int] = {}
    for step, node in enumerate([*front, *p.backward.graph.nodes]):
        backward = step >= len(front)
        if node.op == "call_function" and node.name in infos and not (backward and node.name in forward):
            last[backward, infos[node.name]] = step
    return last


def _ranges(p: Prepared, moved: frozenset[str]) -> Iterator[tuple[str, LiveRange, bool]]:
    """Name, live range over both graphs of the trace, and whether the backward makes it; `moved` remaining out."""
    front, back = list(p.forward.graph.nodes), list(p.backward.graph.nodes)
    steps, total = len(front), len(front) + len(back)
    saved = frozenset(n.name for n in p.saved)
    results = {n.name for n in _returned(p.forward, p.num_forward_outputs)}
    gradients = {n.name for n in _returned(p.backward, None)}
    later = lifetimes(p.backward, fused=p.fused, owned_inputs=saved).ranges
    for name, r in lifetimes(p.forward, fused=p.fused).ranges.items():
        if name in moved:
            continue
        kept = steps + later[name].end if name in saved and name in later else r.end
        yield name, LiveRange(name, r.bytes, r.start, total if name in results else kept), False
    for name, r in later.items():
        if name not in saved:
            end = r.start + 1 if name in gradients else r.end
            yield name, LiveRange(name, r.bytes, steps + r.start, steps + end), True


def _returned(gm: fx.GraphModule, count: int | None) -> set[fx.Node]:
    (output,) = gm.graph.find_nodes(op="output")
    return {storage_of(n) for n in output.args[0][:count] if isinstance(n, fx.Node)}


def row_buffers(problem: Problem, residency: Mapping[str, Residency], played: Simulation) -> Iterator[Buffer]:
    """The rows of every activation: together where they live alike, else apart."""
    copied = _copied(problem, played)
    for a in problem.activations:
        lives: Counter[tuple[int, int]] = Counter()
        home, end = residency[a.name], a.last_backward + 1
        needed = max(a.first_backward, a.last_forward + 1)
        kept = a.bytes * home.kept // a.tokens
        gone = a.bytes * home.recomputed // a.tokens if home.offloaded else a.bytes - kept
        lives[a.produced, end] += kept
        lives[a.produced, a.last_forward + 1] += gone
        lives[needed, end] += gone
        offloaded = a.bytes - kept - gone
        for step, size in _whole(copied[Stream.D2H, a.name], offloaded):
            lives[a.produced, max(step, a.last_forward) + 1] += size
        for step, size in _whole(copied[Stream.H2D, a.name], offloaded):
            lives[min(step, needed), end] += size
        away = problem.away(a) if home.offloaded == a.tokens else ()
        pieces = [
            (piece, size) for (start, stop), size in sorted(lives.items()) for piece in _without(start, stop, away)
        ]
        for k, ((start, stop), size) in enumerate(pieces):
            if size:
                yield Buffer(f"{a.name}:{k}", size, start, min(stop, len(problem.seconds)))


def _without(start: int, stop: int, away: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """A range of steps less others in it, in order.

    >>> list(_without(0, 9, [(2, 4), (6, 7)]))
    [(0, 2), (4, 6), (7, 9)]
    """
    for begin, end in away:
        if start <= begin < end < stop:
            yield start, begin
            start = end
    yield start, stop


def _copied(problem: Problem, played: Simulation) -> defaultdict[tuple[Stream, str], Counter[int]]:
    """By stream and activation, the bytes copied in each step; in a wait, in the step that it is before."""
    ends = [e.end for e in played.events if e.stream is Stream.COMPUTE and e.name != RECOMPUTE]
    copied: defaultdict[tuple[Stream, str], Counter[int]] = defaultdict(Counter)
    for e in played.events:
        if e.stream is Stream.COMPUTE or e.end <= e.start:
            continue
        first, last = bisect_right(ends, e.start), bisect_right(ends, e.end * (1 - 1e-12))
        for step in range(first, min(last, len(ends) - 1) + 1):
            began = max(e.start, ends[step - 1] if step else 0.0)
            until = e.end if step == last or step == len(ends) - 1 else ends[step]
            copied[e.stream, e.name][step] += round(e.bytes * (until - began) / (e.end - e.start))
    return copied


def _whole(parts: Mapping[int, int], size: int) -> list[tuple[int, int]]:
    """Step and bytes of each part; the last makes up for what rounding lost, so that they sum to `size`."""
    rows, remaining = [], size
    for step in sorted(parts):
        rows.append((step, min(parts[step], remaining)))
        remaining -= rows[-1][1]
    if rows:
        rows[-1] = (rows[-1][0], rows[-1][1] + remaining)
    return rows
