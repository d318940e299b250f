"""The rows of the linear program: memory, the two engines, their turn, the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from memo_compile.planning.columns import UNIT, Columns, Grid, Scale
from memo_compile.planning.residency import Problem
from memo_compile.schema import Binding

DRAIN = 40  # intervals of the backward in which offloads may still run, at least


class Rows:
    """Collects a sparse matrix row by row, to be passed to HiGHS at once."""

    def __init__(self) -> None:
        self.starts: list[int] = [0]
        self.index: list[int] = []
        self.value: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []

    def add(self, entries: Mapping[int, float], lower: float, upper: float) -> int:
        for column, value in entries.items():
            if value:
                self.index.append(column)
                self.value.append(value)
        self.starts.append(len(self.index))
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1


def last_copy(grid: Grid, c: Columns) -> int:
    """The interval from which on nothing leaves any more: what is away so late would be back at once."""
    return min(c.intervals, grid.forward + max(DRAIN, (c.intervals - grid.forward) // 8))


Changes = list[dict[int, float]]


def _events(
    problem: Problem, grid: Grid, c: Columns, offloaded: frozenset[str]
) -> tuple[Changes, np.ndarray[Any, Any], Changes, Changes, Changes]:
    """What changes at the start of each interval: live bytes (with a constant), released, due and needed slices.

    Where it is known what is offloaded (`offloaded`), nothing waits after the rest.
    """
    m, steps = c.intervals, len(problem.seconds)
    changes: Changes = [{} for _ in range(m + 1)]
    released: Changes = [{} for _ in range(m + 1)]
    due: Changes = [{} for _ in range(m + 1)]
    needed: Changes = [{} for _ in range(m + 1)]
    constant = np.zeros(m + 1)
    ready = 0
    for i in _queue(problem):
        a = problem.activations[i]
        size = a.bytes / UNIT
        born, gone = grid.of_step[a.produced], grid.of_step[min(a.last_forward + 1, steps)]
        back, dead = max(grid.of_step[a.first_backward], gone), grid.of_step[min(a.last_backward + 1, steps)]
        if problem.calls > 1:
            changes[0][c.kept + i] = (problem.calls - 1) * size
        constant[born] += size
        constant[gone] -= size
        constant[back] += size
        constant[dead] -= size
        changes[gone][c.kept + i] = changes[gone].get(c.kept + i, 0.0) + size
        changes[back][c.kept + i] = changes[back].get(c.kept + i, 0.0) - size
        for begin, end in problem.away(a):
            for at, way in ((grid.of_step[begin], -size), (grid.of_step[end], size)):
                changes[at][c.offloaded + i] = changes[at].get(c.offloaded + i, 0.0) + way
        # The engine's order is that of the due times: what is due later leaves after what is due before.
        here = max(ready, min(grid.of_step[min(a.produced + 1, steps)], gone))
        ready = here if not offloaded or a.name in offloaded else ready
        released[here][c.offloaded + i] = size
        due[gone][c.offloaded + i] = size
        needed[back][c.offloaded + i] = size
    return changes, constant, released, due, needed


def _out_first(problem: Problem, grid: Grid, c: Columns, offloaded: frozenset[str]) -> dict[int, dict[int, float]]:
    """By interval in which an activation of `offloaded` is needed: what may still wait, since it leaves later."""
    queue = _queue(problem)
    earlier: dict[int, float] = {}
    may_wait: list[dict[int, float]] = []
    for i in reversed(queue):
        may_wait.append(dict(earlier))
        earlier[c.offloaded + i] = -problem.activations[i].bytes / UNIT
    place = {i: n for n, i in enumerate(queue)}
    rows: dict[int, dict[int, float]] = {}
    farthest = -1
    for i in sorted(queue, key=lambda i: (problem.activations[i].first_backward, -place[i])):
        if problem.activations[i].name in offloaded and place[i] > farthest:
            farthest = place[i]
            rows.setdefault(int(grid.of_step[problem.activations[i].first_backward]), may_wait[-1 - place[i]])
    return rows


def _queue(problem: Problem) -> list[int]:
    """Activations in the order in which they leave: that of their last uses in the forward."""
    activations = problem.activations
    return sorted(range(len(activations)), key=lambda i: (activations[i].last_forward, activations[i].produced))


Limited = tuple[int, dict[int, float], float]  # a row, and by how much a rate one larger raises its bound: Σ v·x + c


def rows_of_time(
    problem: Problem, grid: Grid, c: Columns, scale: Scale, rows: Rows, offloaded: frozenset[str] | None
) -> tuple[list[int], dict[Binding, list[Limited]]]:
    """Rows for each interval. Returns those of memory, and those that a rate limits.

    `offloaded` are the activations known to be so; with None transfers are instantaneous, as if stalls cost nothing.
    """
    changes, constant, released, due, needed = _events(problem, grid, c, offloaded or frozenset())
    recompute: Changes = [{} for _ in range(c.intervals + 1)]
    for i, a in enumerate(problem.activations):
        if a.recompute_seconds:
            recompute[grid.of_step[a.first_backward]][c.recomputed + i] = a.recompute_seconds / scale.tick
    memory: list[int] = []
    rates: dict[Binding, list[Limited]] = {Binding.OFFLOAD_RATE: [], Binding.PREFETCH_RATE: []}
    last = last_copy(grid, c)
    out_first = _out_first(problem, grid, c, offloaded or frozenset())

    def limited(kind: Binding, column: int, rate: float, time_of: dict[int, float], constant: float) -> None:
        row = rows.add({column: 1.0, **{k: -rate * v for k, v in time_of.items()}}, -math.inf, rate * constant)
        rates[kind].append((row, time_of, constant))

    def in_turn(out: int, back: int, time_of: dict[int, float], constant: float) -> None:
        """One engine after the other."""
        of_time = {k: -v for k, v in time_of.items()}
        row = rows.add({out: 1 / scale.out_rate, back: 1 / scale.in_rate, **of_time}, -math.inf, constant)
        # A rate larger by d takes d · amount / rate² off the seconds.
        rates[Binding.OFFLOAD_RATE].append((row, {out: scale.out_rate**-2}, 0.0))
        rates[Binding.PREFETCH_RATE].append((row, {back: scale.in_rate**-2}, 0.0))

    for i in range(c.intervals):
        before = i > 0
        row = {c.live + i: 1.0, **{k: -v for k, v in changes[i].items()}}
        rows.add({**row, **({c.live + i - 1: -1.0} if before else {})}, constant[i], constant[i])
        if offloaded is None:
            rows.add({c.live + i: 1.0, c.top: -1.0}, -math.inf, -grid.base[i] / UNIT)
            continue
        seconds = float(grid.seconds[i]) / scale.tick
        stalled = {c.stall + i: 1.0}
        if grid.forward <= i < last:
            in_turn(c.out_stalled + i, c.back_stalled + i, stalled, 0.0)
            in_turn(c.out + i, c.back + i, recompute[i], seconds)
        elif i < last:
            limited(Binding.OFFLOAD_RATE, c.out_stalled + i, scale.out_rate, stalled, 0.0)
            limited(Binding.OFFLOAD_RATE, c.out + i, scale.out_rate, recompute[i], seconds)
        elif i >= grid.forward:
            limited(Binding.PREFETCH_RATE, c.back_stalled + i, scale.in_rate, stalled, 0.0)
            limited(Binding.PREFETCH_RATE, c.back + i, scale.in_rate, recompute[i], seconds)
        if i < last:
            copied = {c.out_stalled + i: 1.0, c.out + i: 1.0}
            row = {c.waiting + i: 1.0, **copied, **{k: -v for k, v in released[i].items()}}
            rows.add({**row, **({c.waiting + i - 1: -1.0} if before else {})}, 0.0, 0.0)
            row = {c.overdue + i: 1.0, **copied, **{k: -v for k, v in due[i].items()}}
            rows.add({**row, **({c.overdue + i - 1: -1.0} if before else {})}, 0.0, 0.0)
            rows.add({c.held + i: 1.0, c.overdue + i: -1.0, c.out + i: -1.0}, 0.0, math.inf)
            if i in out_first:
                rows.add({c.waiting + i: 1.0, c.out + i: 1.0, **out_first[i]}, -math.inf, 0.0)
        if i >= grid.forward:
            row = {c.early + i: 1.0, c.back_stalled + i: -1.0, c.back + i: -1.0, **needed[i]}
            rows.add({**row, **({c.early + i - 1: -1.0} if i > grid.forward else {})}, 0.0, 0.0)
            rows.add({c.early + i: 1.0, c.back + i: -1.0}, 0.0, math.inf)
        row = {c.live + i: 1.0, c.held + i: 1.0, c.early + i: 1.0, c.top: -1.0}
        memory.append(rows.add(row, -math.inf, -grid.base[i] / UNIT))
    return memory, rates
