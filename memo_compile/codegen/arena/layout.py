"""Decides where every buffer of a forward and its backward lies: segments, each one storage, and offsets within.

Both graphs share one timeline: the forward's statements, then the backward's. A buffer that a user can hold after the
call (an output, a gradient, also one written over a saved activation) is left to torch's allocator, and so is what
kernels allocate themselves, and what is given to something that memo does not know; all count. What lies on another
device does not: plans and budgets are of one.

The timeline is cut into windows. Buffers that are born in window i and die in window j share segment (i, j), which is
taken when the first of them is born and dropped after the last. With no cut there is one segment, held from the first
statement to the last; each cut lets room go back earlier, so that gradients can be born in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from memo_compile.codegen.arena.joining import Beside, join
from memo_compile.codegen.arena.segments import Lives, choose_cuts, segment_of
from memo_compile.codegen.arena.sides import Sided, key_of
from memo_compile.codegen.emitted.body import Body, Kind, Storage
from memo_compile.hardware.caching_allocator import Life, reserved
from memo_compile.hardware.device_memory import Allocator
from memo_compile.placement import place_layers, verify
from memo_compile.placement.bounds import live_bytes
from memo_compile.placement.problem import aligned
from memo_compile.schema import ArenaBuffer, ArenaSegment, Side

ALIGNMENT = 64  # bytes: what torch's own CPU allocator gives, and enough for vector loads and for CUDA's TMA
SMALLEST = 256  # bytes: alignment would cost a scalar more than it takes, so that torch's allocator keeps those
# The C library serves blocks beyond 32 MiB by fresh mappings, every page of which faults in again at every step: a
# sixth of a step of a small model. Below it, freed blocks are used again.
CHUNK = 16 * 2**20
NOTHING: Mapping[str, int] = MappingProxyType({})
PORTIONS = 24  # kept activations go back in about so many portions: few enough for the allocator, many for the peak


@dataclass(frozen=True)
class Link:
    """A forward output that the backward receives: `output` of the forward is `input` of the backward."""

    output: int
    input: str


@dataclass(frozen=True)
class ArenaLayout:
    """Where everything lies.

    `held` and `live` count the arena alone, step by step; `outside` what lies outside it, of which `lives` has each
    storage; `beside` what other calls hold that wait for their backward; `peak` the worst sum.
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
        return self.beside + max((h + o for h, o in zip(self.held, self.outside, strict=True)), default=0)

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
    beside: int = 0
    lives: tuple[Life, ...] = ()

    def reserved(self, allocator: Allocator) -> int:
        """The most bytes that torch's allocator reserves for segments and storages outside, from empty; what is
        allocated, where its rules are not known."""
        if allocator is Allocator.UNKNOWN:
            return self.peak
        lives = [*((s.start, s.end, s.size) for s in self.segments), *self.lives]
        return self.beside + reserved(lives, expandable=allocator is Allocator.EXPANDABLE)


@dataclass(frozen=True)
class _Timeline:
    steps: int
    forward_steps: int
    buffers: tuple[Sided, ...]
    outside: tuple[int, ...]
    kernels: tuple[int, ...]
    portion: int
    handed_on: int = 0
    alone: frozenset[str] = frozenset()
    lives: tuple[Life, ...] = ()


def plan_arena(
    forward: Body,
    backward: Body,
    links: Sequence[Link],
    user_outputs: int,
    *,
    tangents: Mapping[str, int] = NOTHING,
    chunk: int = CHUNK,
    alone: frozenset[str] = frozenset(),
    layer_of: Mapping[str, int] | None = None,
    emitted: ArenaLayout | None = None,
    calls: int = 1,
    allocator: Allocator = Allocator.UNKNOWN,
) -> ArenaLayout:
    """Place the buffers of both bodies.

    Args:
        forward, backward: what was emitted.
        links: which forward outputs are which backward inputs.
        user_outputs: the first so many outputs of the forward go to the user.
        tangents: bytes of the backward's inputs that come from autograd, by name: it lets go of them in the call.
        chunk: bytes of kept activations in one segment, at most, unless one alone is larger.
        alone: backward buffers that get a segment of their own, so that a call before can take it.
        layer_of: by `key_of` a buffer, the layer of those of layers that may repeat; those that do are placed once.
        calls: so many are between their forward and their backward at once.
        emitted: a layout that the forward's code stands by already; its offsets are kept for the forward's buffers.
        allocator: where its rules are known, segments are joined as far as less is reserved for it.
    """
    keys = frozenset(key_of(Side.BACKWARD, name) for name in alone)
    timeline = replace(_timeline(forward, backward, links, user_outputs, tangents, chunk), alone=keys)
    if emitted is not None:
        layout = _lay_out(timeline, *_around(emitted, timeline, layer_of or {}))
    else:
        groups = _groups(timeline)
        layout = _lay_out(timeline, *_placed(groups, layer_of or {}))
        layout = _with_fewer(layout, timeline, groups, layer_of or {}, allocator)
    return replace(layout, beside=(calls - 1) * _kept_by_call(layout, timeline))


def _with_fewer(
    plain: ArenaLayout,
    timeline: _Timeline,
    groups: Sequence[Sequence[Sided]],
    layer_of: Mapping[str, int],
    allocator: Allocator,
) -> ArenaLayout:
    """The layout with segments joined, where so much less is reserved that the most that is held stays."""
    if allocator is Allocator.UNKNOWN:
        return plain
    beside = Beside(timeline.outside, timeline.lives, timeline.forward_steps, timeline.alone)
    fewer = join(groups, beside, alignment=ALIGNMENT, expandable=allocator is Allocator.EXPANDABLE)
    joined = _lay_out(timeline, *_placed(fewer, layer_of))
    kept = joined.peak <= plain.peak and joined.reserved(allocator) <= plain.reserved(allocator)
    return joined if kept else plain


def _kept_by_call(layout: ArenaLayout, timeline: _Timeline) -> int:
    """Bytes that a call holds once its forward has run: segments, and what lies outside of them."""
    f = timeline.forward_steps
    return sum(s.size for s in layout.segments if s.start < f < s.end) + timeline.handed_on


def _around(
    emitted: ArenaLayout, timeline: _Timeline, layer_of: Mapping[str, int]
) -> tuple[list[ArenaSegment], list[ArenaBuffer]]:
    """The forward's buffers where its code has put them, the backward's placed anew in segments beside."""
    lives = {b.local: b for b in timeline.buffers if b.side is Side.FORWARD}
    fixed = [replace(b, end=lives[b.name].end) for b in emitted.buffers if b.side is Side.FORWARD]
    segments = []
    for s in emitted.segments:
        inside = [b for b in fixed if b.segment == s.name]
        if inside:
            segments.append(replace(s, end=max(b.end for b in inside)))
    held = live_bytes([(s.start, s.end, s.size) for s in segments], timeline.steps)
    beside = tuple(o + h for o, h in zip(timeline.outside, held, strict=True))
    born = tuple(b for b in timeline.buffers if b.side is Side.BACKWARD)
    groups = _groups(replace(timeline, buffers=born, outside=beside))
    more, buffers = _placed(groups, layer_of, len(emitted.segments))
    return [*segments, *more], [*fixed, *buffers]


def _timeline(
    forward: Body, backward: Body, links: Sequence[Link], user_outputs: int, tangents: Mapping[str, int], chunk: int
) -> _Timeline:
    f, steps = forward.steps, forward.steps + backward.steps
    returned = {s for s in backward.outputs if s is not None}
    for_user = {s for s in forward.outputs[:user_outputs] if s is not None} | handed_on(forward, backward, links)
    death: dict[str, int] = {}
    for link in links:
        storage = forward.outputs[link.output]
        if storage is not None:
            death[storage] = max(death.get(storage, 0), f + backward.storages[link.input].end)
    inside: list[Sided] = []
    gone = [(f, f + max(1, _last_held(backward, name, size)), size) for name, size in tangents.items()]
    kernels: list[tuple[int, int, int]] = []

    def add(side: Side, s: Storage, start: int, end: int, given: Collection[str]) -> None:
        if s.kind == Kind.ALLOCATED and s.bytes >= SMALLEST and s.name not in given:
            inside.append(Sided.of(side, s.name, s.bytes, start, end))
        elif s.kind != Kind.INPUT:  # outputs, kernels' own, scalars
            gone.append((start, end, s.bytes))
            if s.kind in (Kind.KERNEL, Kind.HELD) and s.name not in given:
                kernels.append((start, end, s.bytes))

    for s in forward.storages.values():
        end = steps if s.name in for_user else max(s.end, death.get(s.name, 0))
        add(Side.FORWARD, s, s.start, end, for_user)
    for s in backward.storages.values():
        end = backward.steps if s.name in returned else s.end
        add(Side.BACKWARD, s, f + s.start, f + end, returned)
    kept = sum(b.size for b in inside if b.start < f < b.end)
    portion = min(chunk, max(kept // PORTIONS, SMALLEST))
    outside, kernel_bytes = tuple(live_bytes(gone, steps)), tuple(live_bytes(kernels, steps))
    between = sum(size for start, end, size in gone if start < f < end)
    return _Timeline(
        steps=steps,
        forward_steps=f,
        buffers=tuple(inside),
        outside=outside,
        kernels=kernel_bytes,
        portion=portion,
        handed_on=between,
        lives=tuple(gone),
    )


def handed_on(forward: Body, backward: Body, links: Sequence[Link]) -> frozenset[str]:
    """Forward storages that the backward returns, as they are or with a gradient written over: the user's too.

    And those that it gives to what memo does not know, which may keep or return them.
    """
    given = {*backward.outputs, *backward.held}
    returned = {link.output for link in links if link.input in given}
    return frozenset(s for s in (forward.outputs[i] for i in returned) if s is not None)


def _last_held(backward: Body, tangent: str, size: int) -> int:
    """The statement after which autograd lets go of a tangent; it holds a scalar, from which it starts, all along."""
    return backward.storages[tangent].end if size >= SMALLEST and tangent in backward.storages else backward.steps


def _groups(timeline: _Timeline) -> list[list[Sided]]:
    """The buffers of each segment."""
    whole = [replace(b, size=aligned(b.size, ALIGNMENT)) for b in timeline.buffers]
    lives = Lives.of(whole, timeline.steps, timeline.forward_steps, timeline.portion, timeline.alone)
    groups: dict[int, list[Sided]] = defaultdict(list)
    for b, segment in zip(
        timeline.buffers, segment_of(lives, choose_cuts(lives, timeline.outside)).tolist(), strict=True
    ):
        groups[segment].append(b)
    return [group for _, group in sorted(groups.items())]


def _placed(
    groups: Sequence[Sequence[Sided]], layer_of: Mapping[str, int], first: int = 0
) -> tuple[list[ArenaSegment], list[ArenaBuffer]]:
    """Each group at offsets in a segment of its own, numbered from `first`."""
    segments: list[ArenaSegment] = []
    buffers: list[ArenaBuffer] = []
    for index, group in enumerate(groups, first):
        name = f"memo_arena_{index}"
        placement = place_layers(group, layer_of, alignment=ALIGNMENT, time_limit=2.0)
        verify(group, placement)
        start, end = min(b.start for b in group), max(b.end for b in group)
        segments.append(ArenaSegment(name, placement.peak, start, end))
        buffers += [
            ArenaBuffer(
                side=b.side,
                name=b.local,
                segment=name,
                offset=placement.offsets[b.name],
                size=b.size,
                start=b.start,
                end=b.end,
            )
            for b in group
        ]
    return segments, buffers


def _lay_out(timeline: _Timeline, segments: Sequence[ArenaSegment], buffers: Sequence[ArenaBuffer]) -> ArenaLayout:
    held = live_bytes([(s.start, s.end, s.size) for s in segments], timeline.steps)
    live = live_bytes([(b.start, b.end, aligned(b.size, ALIGNMENT)) for b in timeline.buffers], timeline.steps)
    return ArenaLayout(
        segments=tuple(segments),
        buffers=tuple(buffers),
        forward_steps=timeline.forward_steps,
        held=tuple(held),
        live=tuple(live),
        outside=timeline.outside,
        kernels=timeline.kernels,
        lives=timeline.lives,
    )
