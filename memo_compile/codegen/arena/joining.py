"""Segments joined where no peak rises for it, so that torch's CUDA allocator reserves less and is asked less often.

The allocator hands out a heap: segments of many sizes that come and go leave holes between them which the next does not
fit. A segment that is held a little longer than it needs to be, at moments when there is room, leaves none.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from memo_compile.hardware.caching_allocator import Life, reserved
from memo_compile.placement import Buffer
from memo_compile.placement.bounds import live_bytes
from memo_compile.placement.problem import aligned

TRIES = 400  # of two segments to join: some milliseconds each

Array = np.ndarray[Any, Any]
B = TypeVar("B", bound=Buffer)


@dataclass(frozen=True)
class Beside:
    """What lies outside the arena: bytes at each step, and the lives of the storages. The backward begins at `border`.

    A group with a buffer in `alone` stays as it is.
    """

    outside: Sequence[int]
    lives: Sequence[Life]
    border: int
    alone: frozenset[str] = frozenset()


def join(groups: Sequence[Sequence[B]], beside: Beside, *, expandable: bool, alignment: int = 1) -> list[list[B]]:
    """Fewer groups of the same buffers, each of one segment, so that less is reserved.

    The most that is held stays, and so does what is held between forward and backward. Those that waste least when they
    are joined come first. What the forward makes stays apart from what the backward makes, whose segments are its own.
    """
    steps = len(beside.outside)
    made = [_Group.of(number, group, steps, alignment) for number, group in enumerate(groups)]
    joining = _Joining(beside, expandable, made, {i for i, g in enumerate(groups) if _is_alone(g, beside)})
    joining.run()
    return [[b for number in g.members for b in groups[number]] for g in joining.groups.values()]


def _is_alone(group: Sequence[Buffer], beside: Beside) -> bool:
    return any(b.name in beside.alone for b in group)


@dataclass(frozen=True)
class _Group:
    """The buffers of one segment, by the numbers of the groups that they were in. `live` are their bytes by step."""

    members: tuple[int, ...]
    start: int
    end: int
    size: int
    live: Array

    @staticmethod
    def of(number: int, buffers: Sequence[Buffer], steps: int, alignment: int) -> _Group:
        live = live_bytes([(b.start, b.end, aligned(b.size, alignment)) for b in buffers], steps)
        start, end = min(b.start for b in buffers), max(b.end for b in buffers)
        return _Group((number,), start, end, max(live), np.array(live, dtype=np.int64))

    def __or__(self, other: _Group) -> _Group:
        live = self.live + other.live
        start, end = min(self.start, other.start), max(self.end, other.end)
        return _Group(self.members + other.members, start, end, int(live.max()), live)

    @property
    def life(self) -> Life:
        return self.start, self.end, self.size

    @property
    def held(self) -> int:
        """Bytes times steps."""
        return self.size * (self.end - self.start)


class _Joining:
    """The groups so far, by number, and the pairs that have not been tried, by what they would waste."""

    def __init__(self, beside: Beside, expandable: bool, groups: Sequence[_Group], alone: set[int]) -> None:
        self.beside, self.expandable, self.alone = beside, expandable, alone
        self.groups = dict(enumerate(groups))
        self.total = np.array(beside.outside, dtype=np.int64)
        for group in groups:
            self.total[group.start : group.end] += group.size
        self.most = int(self.total.max(initial=0))
        self.reserved = self._reserved(self.groups)
        self.pairs: list[tuple[int, int, int]] = []
        for i, j in itertools.combinations(self.groups, 2):
            self._consider(i, j)

    def run(self) -> None:
        """Join until nothing more can be gained."""
        tries, numbers = 0, itertools.count(len(self.groups))
        while self.pairs and tries < TRIES:
            _, i, j = heapq.heappop(self.pairs)
            if i in self.groups and j in self.groups and int(self._total_with(i, j).max()) <= self.most:
                tries += 1
                self._try(i, j, next(numbers))

    def _consider(self, i: int, j: int) -> None:
        a, b, border = self.groups[i], self.groups[j], self.beside.border
        if i in self.alone or j in self.alone or (a.start < border) != (b.start < border):
            return
        joined = a | b
        between = sum(g.size for g in (a, b) if g.start < border < g.end)
        if between == 0 or joined.size <= between:
            heapq.heappush(self.pairs, (joined.held - a.held - b.held, i, j))

    def _total_with(self, i: int, j: int) -> Array:
        joined, total = self.groups[i] | self.groups[j], self.total.copy()
        for group in (self.groups[i], self.groups[j]):
            total[group.start : group.end] -= group.size
        total[joined.start : joined.end] += joined.size
        return total

    def _try(self, i: int, j: int, number: int) -> None:
        after = {k: g for k, g in self.groups.items() if k not in (i, j)}
        after[number] = self.groups[i] | self.groups[j]
        found = self._reserved(after)
        if found > self.reserved:
            return
        self.total, self.groups, self.reserved = self._total_with(i, j), after, found
        for k in self.groups:
            if k != number:
                self._consider(k, number)

    def _reserved(self, groups: dict[int, _Group]) -> int:
        lives = [g.life for g in groups.values()]
        return reserved([*lives, *self.beside.lives], expandable=self.expandable, rounds=2)
