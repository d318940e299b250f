"""The variables of the linear program: intervals of time, units, and a column for each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from memo_compile.planning.residency import Problem

UNIT = float(2**20)  # bytes


@dataclass(frozen=True)
class Grid:
    """Intervals of steps: `start[i]` is the first step of interval i, `seconds` and `base` its sum and worst."""

    start: tuple[int, ...]
    seconds: np.ndarray[Any, Any]
    base: np.ndarray[Any, Any]
    of_step: np.ndarray[Any, Any]
    forward: int


def grid_of(problem: Problem) -> Grid:
    steps = len(problem.seconds)
    edges = {0, problem.forward_steps}
    for a in problem.activations:
        edges |= {a.produced, a.produced + 1, a.last_forward + 1, a.first_backward, a.last_backward + 1}
        edges |= {step for away in problem.away(a) for step in away}
    start = sorted(e for e in edges if 0 <= e < steps)
    of_step = np.zeros(steps + 1, dtype=int)
    seconds, base = [], []
    for i, (begin, end) in enumerate(pairwise([*start, steps])):
        of_step[begin:end] = i
        seconds.append(sum(problem.seconds[begin:end]))
        base.append(max(problem.base_bytes[begin:end]))
    of_step[steps] = len(start)
    return Grid(
        start=tuple(start),
        seconds=np.array(seconds),
        base=np.array(base, dtype=float),
        of_step=of_step,
        forward=of_step[problem.forward_steps],
    )


@dataclass(frozen=True)
class Scale:
    """`tick` seconds are one unit of time; rates in MiB a tick."""

    tick: float
    out_rate: float
    in_rate: float

    @staticmethod
    def of(problem: Problem) -> Scale:
        tick = max(sum(problem.seconds), 1e-12) / 1000
        return Scale(tick, problem.d2h / UNIT * tick, problem.h2d / UNIT * tick)


@dataclass(frozen=True)
class Columns:
    """Where each kind of variable begins. All but the first three have one for each interval."""

    activations: int
    intervals: int
    kept: int
    offloaded: int
    recomputed: int
    live: int  # MiB of activations
    stall: int  # ticks before the interval
    out_stalled: int  # copied to the host in the stall
    out: int  # copied to the host during the interval
    waiting: int  # made and not copied, after the interval
    overdue: int  # due less copied, after the interval; below 0 where copies are ahead
    held: int  # overdue at the start of the interval
    back_stalled: int  # landed in the stall
    back: int  # landed during the interval
    early: int  # landed and not yet used, after the interval
    top: int  # the peak
    count: int

    @staticmethod
    def of(n: int, m: int) -> Columns:
        """The columns of `n` activations in `m` intervals."""
        first = {name: 3 * n + place * m for place, name in enumerate(_BY_INTERVAL)}
        top = 3 * n + len(_BY_INTERVAL) * m
        return Columns(
            activations=n, intervals=m, kept=0, offloaded=n, recomputed=2 * n, **first, top=top, count=top + 1
        )


_BY_INTERVAL = ("live", "stall", "out_stalled", "out", "waiting", "overdue", "held", "back_stalled", "back", "early")
