"""Which buffers share a segment: the timeline is cut into windows, and cuts are chosen so that little is held in vain.

Buffers that are born in window i and die in window j share a segment; kept activations, in the order of their last
backward use, also go apart in portions, since all of them are live at the border between the graphs anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memo_compile.placement import Buffer

MAX_CUTS = 80
CANDIDATES = 400
MAX_TIMES = 1500  # births and deaths that are all tried as cuts
BLOCKS = (64, 16, 4, 1)  # so many cuts at once are left out again
STRETCHES = 40  # of the timeline, from each of which as many candidates are taken
WINDOWS = (4, 8, 12, 16, 24, 32)  # divisions of each graph to begin with: layers are as alike as their needs
NEAR = 12  # candidates on each side of the worst moment that are tried in pairs

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Lives:
    """Buffers as arrays: birth, death and bytes each; `portion` is 0 for scratch; other portions lie apart.

    `order` sorts births and deaths by time, deaths first; event e < n is the birth of buffer e, else a death.
    """

    steps: int
    border: int
    start: Array
    end: Array
    size: Array
    portion: Array
    order: Array
    delta: Array

    @staticmethod
    def of(
        buffers: Sequence[Buffer], steps: int, border: int, portion_bytes: int, alone: Collection[str] = ()
    ) -> Lives:
        """Arrays for buffers on a timeline of `steps`, the backward beginning at `border`.

        Kept activations go in portions of `portion_bytes`, those whose names are in `alone` each by itself.
        """
        start = np.array([b.start for b in buffers], dtype=np.int64)
        end = np.array([b.end for b in buffers], dtype=np.int64)
        size = np.array([b.size for b in buffers], dtype=np.int64)
        delta = np.concatenate([size, -size])
        order = np.lexsort((delta, np.concatenate([start, end])))
        portion = _portions(buffers, border, portion_bytes, alone)
        return Lives(
            steps=steps, border=border, start=start, end=end, size=size, portion=portion, order=order, delta=delta
        )


def _portions(buffers: Sequence[Buffer], border: int, portion_bytes: int, alone: Collection[str]) -> Array:
    portion = np.zeros(len(buffers), dtype=np.int64)
    kept = [i for i, b in enumerate(buffers) if b.start < border < b.end and b.name not in alone]
    room, number = 0, 0
    for i in sorted(kept, key=lambda i: (buffers[i].end, buffers[i].start, buffers[i].name)):
        if buffers[i].size > room:
            number, room = number + 1, portion_bytes
        portion[i] = number
        room -= buffers[i].size
    for i, b in enumerate(buffers):
        if b.name in alone:
            number += 1
            portion[i] = number
    return portion


def segment_of(lives: Lives, cuts: Sequence[int]) -> Array:
    """For each buffer, the number of its segment under these cuts."""
    at = np.array(sorted(cuts), dtype=np.int64)
    born = np.searchsorted(at, lives.start, side="right")
    dies = np.searchsorted(at, lives.end - 1, side="right")
    key = (born * (len(at) + 1) + dies) * (int(lives.portion.max(initial=0)) + 1) + lives.portion
    return np.unique(key, return_inverse=True)[1]


def held_bytes(lives: Lives, cuts: Sequence[int]) -> Array:
    """Bytes held at each step if every segment is as large as its lower bound, as nearly always."""
    segment = segment_of(lives, cuts)
    of_event = np.concatenate([segment, segment])[lives.order]
    by_segment = np.argsort(of_event, kind="stable")
    # Each segment's births and deaths sum to nothing, so that one running sum serves all.
    live = np.cumsum(lives.delta[lives.order][by_segment])
    first = np.searchsorted(of_event[by_segment], np.arange(segment.max(initial=-1) + 1))
    size = np.maximum.reduceat(live, first) if len(first) else live
    start = np.full(len(size), lives.steps, dtype=np.int64)
    end = np.zeros(len(size), dtype=np.int64)
    np.minimum.at(start, segment, lives.start)
    np.maximum.at(end, segment, lives.end)
    return _live(lives.steps, start, end, size)


def live_bytes_of(lives: Lives) -> Array:
    """Bytes of buffers live at each step."""
    return _live(lives.steps, lives.start, lives.end, lives.size)


def _live(steps: int, start: Array, end: Array, size: Array) -> Array:
    """`placement.bounds.live_bytes` for arrays."""
    change = np.zeros(steps + 1, dtype=np.int64)
    np.add.at(change, start, size)
    np.add.at(change, end, -size)
    return np.cumsum(change[:-1])


def choose_cuts(lives: Lives, outside: Sequence[int]) -> tuple[int, ...]:
    """Of a few even divisions the best, then greedy: the cut that removes most of what is held beyond the bounds.

    Where that ends above the bounds, the least of all cuts that do better.

    The bounds are the largest sums of live bytes, with what lies outside the arena and without. What is beyond them is
    squared and summed over the timeline, so that a cut in one layer counts although the others are as bad.

    Args:
        outside: bytes that are held at each step beside the segments.
    """
    # What is kept is handed from one graph to the other; scratch is not: no segment spans the border but theirs.
    cuts: tuple[int, ...] = (lives.border,)
    if not len(lives.start):
        return cuts
    beside, live = np.array(outside, dtype=np.int64), live_bytes_of(lives)
    bound, arena_bound = max(1, int((live + beside).max())), max(1, int(live.max()))

    def beyond(candidate: tuple[int, ...]) -> Array:
        held = held_bytes(lives, candidate)
        total = np.maximum((held + beside) / bound - 1.0, 0.0)
        return np.square(total) + np.square(np.maximum(held / arena_bound - 1.0, 0.0))

    def cost(candidate: tuple[int, ...]) -> float:
        return float(beyond(candidate).sum())

    scratch = scratch_bytes(lives)
    moments = candidates(lives, scratch)
    best = cost(cuts)
    for windows in WINDOWS if best > 0.0 else ():
        start = _with((lives.border,), _even(scratch, lives.border, windows))
        if (value := cost(start)) < best:
            cuts, best = start, value
    while best > 0.0 and len(cuts) < MAX_CUTS:
        free = [c for c in moments if c not in cuts]
        singles: list[tuple[int, ...]] = [(c,) for c in free]
        value, more = min(((cost(_with(cuts, t)), t) for t in singles), default=(best, ()))
        if value >= best:  # two cuts may free what lies between them
            worst = int(beyond(cuts).argmax())
            before, after = [c for c in free if c <= worst][-NEAR:], [c for c in free if c > worst][:NEAR]
            pairs = itertools.product(before, after)
            value, more = min(((cost(_with(cuts, t)), t) for t in pairs), default=(best, ()))
        if value >= best:
            break
        cuts, best = _with(cuts, more), value
    cuts = _fewer(cuts, lives.border, cost)
    if best > 0.0:  # the other way round: every cut there could be, less those that are not needed
        many = _times(lives) if len(_times(lives)) <= MAX_TIMES else moments
        needed = _fewer(_with((lives.border,), tuple(many)), lives.border, cost)
        if cost(needed) < best and len(needed) <= MAX_CUTS:
            return needed
    return cuts


def _fewer(cuts: tuple[int, ...], border: int, cost: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The cuts without those that make nothing better, tried many at once and then one by one."""
    best = cost(cuts)
    for size in BLOCKS:
        others = [c for c in cuts if c != border]
        for block in (set(others[i : i + size]) for i in range(0, len(others), size)):
            fewer = tuple(c for c in cuts if c not in block)
            if (value := cost(fewer)) <= best:
                cuts, best = fewer, value
    return cuts


def _times(lives: Lives) -> list[int]:
    """All births and deaths between the ends and the border."""
    return sorted(set(np.concatenate([lives.start, lives.end]).tolist()) - {0, lives.border, lives.steps})


def _even(scratch: Array, border: int, windows: int) -> tuple[int, ...]:
    """Cuts that divide each graph into so many windows, each where the least scratch is live."""
    cuts = []
    for begin, end in ((0, border), (border, len(scratch))):
        edges = np.linspace(begin, end, windows + 1).astype(int)
        cuts += [int(a) + int(scratch[a:b].argmin()) for a, b in itertools.pairwise(edges) if b > a]
    return tuple({int(c) for c in cuts if 0 < c < len(scratch) and c != border})


def _with(cuts: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted((*cuts, *more)))


def scratch_bytes(lives: Lives) -> Array:
    """Bytes of what is not kept for the backward, at each step."""
    scratch = (lives.portion == 0).nonzero()[0]
    return _live(lives.steps, lives.start[scratch], lives.end[scratch], lives.size[scratch])


def candidates(lives: Lives, scratch: Array) -> list[int]:
    """Births and deaths; where there are many, in each stretch those at which the fewest bytes of scratch are live."""
    stretch = -(-lives.steps // STRETCHES)
    ranked = sorted(_times(lives), key=lambda t: (t // stretch, int(scratch[t]), t))
    each = CANDIDATES // STRETCHES
    return sorted(t for _, group in itertools.groupby(ranked, lambda t: t // stretch) for t in list(group)[:each])
