"""Decides where every buffer of a forward and its backward lies: segments, each one storage, and offsets within.

Both graphs share one timeline: the forward's statements, then the backward's. A buffer that a user can hold after the
call (an output, a gradient) is left to torch's allocator, and so is what kernels allocate themselves; both count.

The timeline is cut into windows. Buffers that are born in window i and die in window j share segment (i, j), which is
taken when the first of them is born and dropped after the last. With no cut there is one segment, held from the first
statement to the last; each cut lets room go back earlier, so that gradients can be born in it. Cuts are added one at a
time, as long as what is held at the worst moment falls.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memo_compile.codegen.emitted import Body, live_bytes
from memo_compile.placement import Buffer, place, verify
from memo_compile.schema import ArenaBuffer, ArenaSegment

ALIGNMENT = 64  # bytes: what torch's own CPU allocator gives, and enough for vector loads and for CUDA's TMA
GOOD_ENOUGH = 1.0002  # of the lower bound: below that another segment costs more than it saves
MAX_CUTS = 48
SMALLEST = 256  # bytes: alignment would cost a scalar more than it takes, so that torch's allocator keeps those
# The C library serves blocks beyond 32 MiB by fresh mappings, every page of which faults in again at every step: a
# sixth of a step of a small model. Below it, freed blocks are used again.
CHUNK = 16 * 2**20
CHUNKS = 24  # kept activations go back in about so many portions: few enough for the allocator, many for the peak


@dataclass(frozen=True)
class Link:
    """A forward output that the backward receives: `output` of the forward is `input` of the backward."""

    output: int
    input: str


@dataclass(frozen=True)
class ArenaLayout:
    """Where everything lies. Names of backward buffers are prefixed `bw:`, those of forward buffers `fw:`.

    `held` and `live` count the arena alone, step by step; `outside` what lies outside it; `peak` the worst sum.
    """

    segments: tuple[ArenaSegment, ...]
    buffers: tuple[ArenaBuffer, ...]
    forward_steps: int
    held: tuple[int, ...]
    live: tuple[int, ...]
    outside: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most bytes held at once: segments, outputs, gradients, what kernels allocate."""
        return max((h + o for h, o in zip(self.held, self.outside, strict=True)), default=0)

    @property
    def arena_bytes(self) -> int:
        """The most bytes of segments held at once."""
        return max(self.held, default=0)

    @property
    def lower_bound(self) -> int:
        """The most bytes of placed buffers live at once: no placement holds less."""
        return max(self.live, default=0)

    @property
    def coverage(self) -> float:
        """Of the bytes live at the measured peak, the share that lies in the arena; gradients and outputs left out."""
        if not self.held:
            return 1.0
        totals = [h + o for h, o in zip(self.held, self.outside, strict=True)]
        at = totals.index(max(totals))
        return self.live[at] / max(1, self.live[at] + self.kernels[at])

    kernels: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Timeline:
    steps: int
    forward_steps: int
    buffers: tuple[Buffer, ...]
    outside: tuple[int, ...]
    kernels: tuple[int, ...]
    chunk: int
    alone: frozenset[str] = frozenset()


def plan_arena(
    forward: Body,
    backward: Body,
    links: Sequence[Link],
    user_outputs: int,
    *,
    tangent_bytes: int = 0,
    chunk: int = CHUNK,
    alone: frozenset[str] = frozenset(),
) -> ArenaLayout:
    """Place the buffers of both bodies.

    Args:
        forward, backward: what was emitted.
        links: which forward outputs are which backward inputs.
        user_outputs: the first so many outputs of the forward go to the user.
        tangent_bytes: what autograd holds for the backward to start from.
        chunk: bytes of kept activations in one segment, at most, unless one alone is larger.
        alone: names of backward buffers that get a segment of their own, so that a call before can take it.
    """
    timeline = replace(_timeline(forward, backward, links, user_outputs, tangent_bytes, chunk), alone=alone)
    cuts = _choose_cuts(timeline)
    return _lay_out(timeline, cuts)


def _timeline(
    forward: Body, backward: Body, links: Sequence[Link], user_outputs: int, tangent_bytes: int, chunk: int
) -> _Timeline:
    f, steps = forward.steps, forward.steps + backward.steps
    for_user = {s for s in forward.outputs[:user_outputs] if s is not None}
    returned = {s for s in backward.outputs if s is not None}
    death: dict[str, int] = {}
    for link in links:
        storage = forward.outputs[link.output]
        if storage is not None:
            received = backward.storages[link.input]
            death[storage] = max(death.get(storage, 0), f + received.end)
    inside: list[Buffer] = []
    gone: list[tuple[int, int, int]] = [(f, steps, tangent_bytes)]
    kernels: list[tuple[int, int, int]] = []
    for s in forward.storages.values():
        end = steps if s.name in for_user else max(s.end, death.get(s.name, 0))
        if s.kind == "allocated" and s.bytes >= SMALLEST and s.name not in for_user:
            inside.append(Buffer(f"fw:{s.name}", s.bytes, s.start, end))
        elif s.kind != "input":  # outputs, kernels' own, scalars
            gone.append((s.start, end, s.bytes))
            if s.kind == "kernel" and s.name not in for_user:
                kernels.append((s.start, end, s.bytes))
    for s in backward.storages.values():
        end = backward.steps if s.name in returned else s.end
        if s.kind == "allocated" and s.bytes >= SMALLEST and s.name not in returned:
            inside.append(Buffer(f"bw:{s.name}", s.bytes, f + s.start, f + end))
        elif s.kind != "input":
            gone.append((f + s.start, f + end, s.bytes))
            if s.kind == "kernel" and s.name not in returned:
                kernels.append((f + s.start, f + end, s.bytes))
    kept = sum(b.size for b in inside if b.start < f < b.end)
    chunk = min(chunk, max(kept // CHUNKS, SMALLEST))
    outside, kernel_bytes = tuple(live_bytes(gone, steps)), tuple(live_bytes(kernels, steps))
    return _Timeline(steps, f, tuple(inside), outside, kernel_bytes, chunk)


def _groups(timeline: _Timeline, cuts: Sequence[int]) -> list[list[Buffer]]:
    """The buffers of each segment."""
    groups: dict[tuple[int, int], list[Buffer]] = defaultdict(list)
    for b in timeline.buffers:
        if b.name in timeline.alone:
            continue
        groups[_window(b.start, cuts), _window(b.end - 1, cuts)].append(b)
    segments: list[list[Buffer]] = []
    for _, group in sorted(groups.items()):
        kept = group[0].start < timeline.forward_steps < group[0].end
        segments += _chunks(group, timeline.chunk) if kept else [group]
    return segments + [[b] for b in timeline.buffers if b.name in timeline.alone]


def _chunks(group: Sequence[Buffer], size: int) -> list[list[Buffer]]:
    """Kept activations all live at the border, so that apart they take no more room than together; those that die
    first together can go first.
    """
    chunks: list[list[Buffer]] = []
    room = 0
    for b in sorted(group, key=lambda b: (b.end, b.start, b.name)):
        if _aligned(b.size) > room:
            chunks.append([])
            room = size
        chunks[-1].append(b)
        room -= _aligned(b.size)
    return chunks


def _window(step: int, cuts: Sequence[int]) -> int:
    return sum(1 for c in cuts if c <= step)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _held_estimate(timeline: _Timeline, cuts: Sequence[int]) -> list[int]:
    """What is held if every segment reaches its own lower bound; greedy placement nearly always does."""
    ranges = []
    for group in _groups(timeline, cuts):
        start, end = min(b.start for b in group), max(b.end for b in group)
        local = [(b.start - start, b.end - start, _aligned(b.size)) for b in group]
        ranges.append((start, end, max(live_bytes(local, end - start))))
    return live_bytes(ranges, timeline.steps)


def _choose_cuts(timeline: _Timeline) -> tuple[int, ...]:
    """Greedy: the cut that lowers the worst sum most, then the next, until the lower bound is reached or none helps."""
    live = live_bytes([(b.start, b.end, _aligned(b.size)) for b in timeline.buffers], timeline.steps)
    bound = max((a + o for a, o in zip(live, timeline.outside, strict=True)), default=0)
    arena_bound = max(live, default=0)
    # What is kept is handed from one graph to the other; scratch is not: no segment spans the border but theirs.
    cuts: tuple[int, ...] = (timeline.forward_steps,)

    def cost(candidate: tuple[int, ...]) -> float:
        held = _held_estimate(timeline, candidate)
        total = max((h + o for h, o in zip(held, timeline.outside, strict=True)), default=0)
        return max(total / max(bound, 1), max(held, default=0) / max(arena_bound, 1))

    best = cost(cuts)
    candidates = _candidate_cuts(live, timeline)
    while best > GOOD_ENOUGH and len(cuts) < MAX_CUTS:
        trials = [(cost(tuple(sorted((*cuts, c)))), c) for c in candidates if c not in cuts]
        if not trials:
            break
        value, cut = min(trials)
        if value >= best:
            cut = _middle_of_worst(timeline, cuts, candidates)
            if cut < 0:
                break
            value = cost(tuple(sorted((*cuts, cut))))
        cuts, best = tuple(sorted((*cuts, cut))), min(best, value)
    return cuts


def _middle_of_worst(timeline: _Timeline, cuts: Sequence[int], candidates: Sequence[int]) -> int:
    """No single cut helps: halve the longest window, since two cuts together may."""
    edges = [0, *cuts, timeline.steps]
    spans = sorted(((b - a, a, b) for a, b in itertools.pairwise(edges)), reverse=True)
    for _, a, b in spans:
        inner = [c for c in candidates if a < c < b]
        if inner:
            return inner[len(inner) // 2]
    return -1


def _candidate_cuts(live: Sequence[int], timeline: _Timeline) -> list[int]:
    """Where few bytes of short-lived buffers are live: local minima, the border between the graphs among them."""
    short = live_bytes(
        [(b.start, b.end, b.size) for b in timeline.buffers if not b.start < timeline.forward_steps < b.end],
        timeline.steps,
    )
    found = {timeline.forward_steps}
    for t in range(1, timeline.steps - 1):
        if short[t] <= short[t - 1] and short[t] < short[t + 1]:
            found.add(t)
    ranked = sorted(found - {timeline.forward_steps, 0}, key=lambda t: (short[t], t))[:160]
    return sorted({timeline.forward_steps, *ranked} - {0, timeline.steps})


def _lay_out(timeline: _Timeline, cuts: Sequence[int]) -> ArenaLayout:
    segments: list[ArenaSegment] = []
    buffers: list[ArenaBuffer] = []
    for index, group in enumerate(_groups(timeline, cuts)):
        name = f"memo_arena_{index}"
        placement = place(group, alignment=ALIGNMENT, time_limit=2.0)
        verify(group, placement)
        start, end = min(b.start for b in group), max(b.end for b in group)
        segments.append(ArenaSegment(name, placement.peak, start, end))
        buffers += [ArenaBuffer(b.name, name, placement.offsets[b.name], b.size, b.start, b.end) for b in group]
    held = live_bytes([(s.start, s.end, s.size) for s in segments], timeline.steps)
    live = live_bytes([(b.start, b.end, _aligned(b.size)) for b in timeline.buffers], timeline.steps)
    return ArenaLayout(
        tuple(segments),
        tuple(buffers),
        timeline.forward_steps,
        tuple(held),
        tuple(live),
        timeline.outside,
        timeline.kernels,
    )
