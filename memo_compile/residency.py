"""The linear program: how much of each saved activation is kept, offloaded, recomputed.

Pure functions over plain data; nothing here knows of graphs. Time is a row of steps, forward then backward, merged into
intervals between which nothing is born or dies. All state is carried from interval to interval, so that the matrix is
sparse: a few entries a row, however many activations there are.

For activation a: bytes b, fractions k (kept), o (offloaded), r (recomputed), k + o + r = 1.

* memory   its bytes are live on [produced, last_forward] and on [first_backward, last_backward] whole, k·b in between
* out      a slice occupies the device until the D2H engine has copied it. The engine works through a queue, which
           counts towards memory: queue(i) ≥ queue(i-1) + o·b of what is due in i - rate · (seconds(i) + stall(i))
* in       slices land before their first use: what has landed early counts towards memory; in a stall more lands
* host     Σ o·b ≤ host budget
* least    Σ r · recompute seconds + Σ stalls + a tie-break on the bytes moved

After DESIGN: MEMO (SIGMOD 2025) section 4.2 has one fraction for all tensors and the memory and host rows only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from memo_compile.solver import quiet_highs

SLACK = 0.0005  # of the smallest peak: room in which the least plan may choose the faster of two
TIE_BREAK = 1e-4  # of the seconds that a transfer takes: enough to prefer fewer bytes, too little to pay for them


@dataclass(frozen=True)
class Activation:
    """One saved activation. Steps are indices on the timeline; `tokens` = 1 means that it has one home, whole.

    `first_backward` is the first step that needs it, be it for a gradient or to recompute another activation.
    `recompute_seconds` is None where it must not be made again; with `recompute_whole` it is made again whole or not
    at all, while its rows may be kept and offloaded in slices.
    """

    name: str
    bytes: int
    tokens: int
    produced: int
    last_forward: int
    first_backward: int
    last_backward: int
    recompute_seconds: float | None
    can_offload: bool = True
    recompute_whole: bool = False


@dataclass(frozen=True)
class Problem:
    """`seconds` and `base_bytes` per step; `base_bytes` is live whatever is decided. Rates in bytes/s."""

    seconds: tuple[float, ...]
    base_bytes: tuple[int, ...]
    forward_steps: int
    activations: tuple[Activation, ...]
    budget: int | None
    host_budget: int
    d2h: float
    h2d: float
    slice_tokens: int = 1


@dataclass(frozen=True)
class Residency:
    """Tokens of one activation in each home; they sum to its tokens."""

    kept: int
    offloaded: int
    recomputed: int


@dataclass(frozen=True)
class Decision:
    """The program's answer. `seconds` is the predicted step; `binding` names the constraint that costs most."""

    residency: dict[str, Residency]
    peak: int
    seconds: float
    stall_seconds: float
    recompute_seconds: float
    binding: str
    prices: Mapping[str, float]
    solver_seconds: float


def decide(problem: Problem, *, time_limit: float = 10.0) -> Decision | None:
    """The fastest residency within the budget; None where the program has no solution."""
    started = time.perf_counter()
    grid = _grid(problem)
    budget = float("inf") if problem.budget is None else float(problem.budget)
    answer = _solve(problem, grid, budget, time_limit)
    return None if answer is None else _decision(problem, answer, time.perf_counter() - started)


def least(problem: Problem, *, time_limit: float = 10.0) -> Decision:
    """The residency with the smallest peak, and the fastest of those within a thousandth of it."""
    started = time.perf_counter()
    grid = _grid(problem)
    smallest = _solve(problem, grid, None, time_limit)
    assert smallest is not None, "without a budget everything can be kept"
    within = smallest.peak * (1 + SLACK) + 4096
    answer = _solve(problem, grid, within, time_limit)
    return _decision(problem, answer or smallest, time.perf_counter() - started)


def _decision(problem: Problem, answer: _Answer, solver_seconds: float) -> Decision:
    residency = {a.name: _rounded(a, answer, i, problem) for i, a in enumerate(problem.activations)}
    recompute = sum((a.recompute_seconds or 0.0) * residency[a.name].recomputed / a.tokens for a in problem.activations)
    return Decision(
        residency,
        max(memory_profile(problem, residency), default=0),
        sum(problem.seconds) + recompute + answer.stall,
        answer.stall,
        recompute,
        max(answer.prices, key=lambda key: answer.prices[key]) if any(answer.prices.values()) else "nothing",
        answer.prices,
        solver_seconds,
    )


def memory_profile(problem: Problem, residency: Mapping[str, Residency]) -> list[int]:
    """Bytes live at each step under `residency`, transfers taken to be instantaneous."""
    steps = len(problem.seconds)
    change = np.zeros(steps + 1)
    for a in problem.activations:
        gone = a.bytes * (1 - residency[a.name].kept / a.tokens)
        change[a.produced] += a.bytes
        change[min(a.last_forward + 1, steps)] -= gone
        change[min(max(a.first_backward, a.last_forward + 1), steps)] += gone
        change[min(a.last_backward + 1, steps)] -= a.bytes
    return [int(v) for v in np.cumsum(change[:-1]) + np.array(problem.base_bytes)]


@dataclass(frozen=True)
class _Grid:
    """Intervals of steps: `start[i]` is the first step of interval i, `seconds` and `base` its sum and worst."""

    start: tuple[int, ...]
    seconds: np.ndarray[Any, Any]
    base: np.ndarray[Any, Any]
    of_step: np.ndarray[Any, Any]
    forward: int


def _grid(problem: Problem) -> _Grid:
    steps = len(problem.seconds)
    edges = {0, problem.forward_steps}
    for a in problem.activations:
        edges |= {a.produced, a.last_forward + 1, a.first_backward, a.last_backward + 1}
    start = sorted(e for e in edges if 0 <= e < steps)
    of_step = np.zeros(steps + 1, dtype=int)
    seconds, base = [], []
    for i, (begin, end) in enumerate(pairwise([*start, steps])):
        of_step[begin:end] = i
        seconds.append(sum(problem.seconds[begin:end]))
        base.append(max(problem.base_bytes[begin:end]))
    of_step[steps] = len(start)
    return _Grid(tuple(start), np.array(seconds), np.array(base, dtype=float), of_step, of_step[problem.forward_steps])


@dataclass(frozen=True)
class _Answer:
    fractions: np.ndarray[Any, Any]  # (activations, 3): kept, offloaded, recomputed
    peak: float
    stall: float
    prices: dict[str, float]


class _Rows:
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


def _solve(problem: Problem, grid: _Grid, budget: float | None, time_limit: float) -> _Answer | None:
    """Solve for the least time within `budget`, or with None for the least peak; None where there is no solution.

    Bytes are scaled to MiB and seconds to thousandths of the step, so that the solver's tolerances are small beside
    both.
    """
    import highspy

    inf = highspy.kHighsInf
    unit = float(2**20)
    acts = problem.activations
    n, m = len(acts), len(grid.start)
    f = grid.forward
    kept, away, again = 0, n, 2 * n  # k, o, r
    live = 3 * n  # live(i): MiB of activations
    queue = live + m  # forward: waiting to leave; backward: landed early, after this interval's uses
    landed = queue + m  # backward: arrives during the interval's computation
    stall = landed + m  # seconds
    top = stall + m  # the peak, MiB
    columns = top + 1
    cost = np.zeros(columns)
    lower, upper = np.zeros(columns), np.full(columns, inf)
    integral = np.zeros(columns, dtype=bool)
    rows = _Rows()
    size = np.array([a.bytes / unit for a in acts])
    tick = max(sum(problem.seconds), 1e-12) / 1000
    seconds = grid.seconds / tick
    out_rate, in_rate = problem.d2h / unit * tick, problem.h2d / unit * tick
    for i, a in enumerate(acts):
        upper[[kept + i, away + i, again + i]] = 1.0
        if not a.can_offload:
            upper[away + i] = 0.0
        if a.recompute_seconds is None:
            upper[again + i] = 0.0
        if a.tokens == 1:
            integral[[kept + i, away + i, again + i]] = True
        elif a.recompute_whole:
            integral[again + i] = a.recompute_seconds is not None
        rows.add({kept + i: 1.0, away + i: 1.0, again + i: 1.0}, 1.0, 1.0)
        transfer = size[i] * (1 / out_rate + 1 / in_rate)
        cost[away + i] = TIE_BREAK * transfer
        cost[again + i] = (a.recompute_seconds or 0.0) / tick
    cost[stall : stall + m] = 1.0
    changes: list[dict[int, float]] = [{} for _ in range(m + 1)]
    constant = np.zeros(m + 1)
    leaving: list[dict[int, float]] = [{} for _ in range(m + 1)]
    landing: list[dict[int, float]] = [{} for _ in range(m + 1)]
    for i, a in enumerate(acts):
        born, gone = grid.of_step[a.produced], grid.of_step[min(a.last_forward + 1, len(problem.seconds))]
        back, dead = grid.of_step[a.first_backward], grid.of_step[min(a.last_backward + 1, len(problem.seconds))]
        back = max(back, gone)
        constant[born] += size[i]
        constant[gone] -= size[i]
        changes[gone][kept + i] = changes[gone].get(kept + i, 0.0) + size[i]
        constant[back] += size[i]
        changes[back][kept + i] = changes[back].get(kept + i, 0.0) - size[i]
        constant[dead] -= size[i]
        leaving[min(gone, max(f - 1, 0))][away + i] = size[i]
        landing[back][away + i] = size[i]
    memory_rows = []
    for i in range(m):
        row = {live + i: 1.0, **{c: -v for c, v in changes[i].items()}}
        if i:
            row[live + i - 1] = -1.0
        rows.add(row, constant[i], constant[i])
        if i < f:  # queue(i) - queue(i-1) - leaving(i) + rate·stall(i) >= -rate·seconds(i)
            row = {queue + i: 1.0, stall + i: out_rate, **{c: -v for c, v in leaving[i].items()}}
            if i:
                row[queue + i - 1] = -1.0
            rows.add(row, -out_rate * seconds[i], inf)
            upper[landed + i] = 0.0
        else:  # early(i) = early(i-1) + landed(i-1) + rate·stall(i) - landing(i) >= 0, as far as it is used
            upper[landed + i] = in_rate * seconds[i]
            row = {queue + i: 1.0, stall + i: -in_rate, **landing[i]}
            if i > f:
                row[queue + i - 1] = -1.0
                row[landed + i - 1] = -1.0
            rows.add(row, -inf, 0.0)
        row = {live + i: 1.0, queue + i: 1.0, landed + i: 1.0, top: -1.0}
        memory_rows.append(rows.add(row, -inf, -grid.base[i] / unit))
    host_row = rows.add({away + i: size[i] for i in range(n)}, -inf, max(problem.host_budget, 0) / unit)
    if budget is None:
        # The smallest peak first; seconds only break ties.
        cost = cost * 1e-6
        cost[top] = 1.0
    else:
        upper[top] = min(budget / unit, inf)
    highs = quiet_highs(time_limit)
    highs.setOptionValue("mip_rel_gap", 1e-3)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, len(rows.lower)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, lower, upper
    lp.row_lower_, lp.row_upper_ = np.array(rows.lower), np.array(rows.upper)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array(rows.starts, dtype=np.int32)
    lp.a_matrix_.index_ = np.array(rows.index, dtype=np.int32)
    lp.a_matrix_.value_ = np.array(rows.value)
    if integral.any():
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if flag else kinds.kContinuous for flag in integral]
    highs.passModel(lp)
    highs.run()
    status = highs.getModelStatus()
    solution = highs.getSolution()
    values = np.array(solution.col_value)
    if len(values) != columns or status == highspy.HighsModelStatus.kInfeasible or not solution.value_valid:
        return None
    fractions = np.stack([values[kept:away], values[away:again], values[again:live]], axis=1)
    prices = {"device memory": 0.0, "host memory": 0.0}
    if not integral.any() and solution.dual_valid and budget is not None:
        duals = np.array(solution.row_dual)
        prices["device memory"] = tick * float(-min(0.0, sum(duals[r] for r in memory_rows))) * 1024
        prices["host memory"] = tick * float(-min(0.0, duals[host_row])) * 1024
    return _Answer(np.clip(fractions, 0.0, 1.0), values[top] * unit, tick * float(values[stall:top].sum()), prices)


def worst_moment(problem: Problem, residency: Mapping[str, Residency]) -> list[Activation]:
    """The activations that are live at the worst moment of a plan whatever their homes, largest first."""
    profile = memory_profile(problem, residency)
    worst = profile.index(max(profile))
    live = [
        a
        for a in problem.activations
        if a.produced <= worst <= a.last_forward or a.first_backward <= worst <= a.last_backward
    ]
    return sorted(live, key=lambda a: (-a.bytes, a.name))


def _rounded(a: Activation, answer: _Answer, index: int, problem: Problem) -> Residency:
    """Whole slices. What is kept is rounded down, so that no memory row breaks; what is left over moves to a home
    that is open to it, recomputation before the host, so that the host's row holds too.
    """
    k, o, r = answer.fractions[index]
    if a.tokens == 1:
        best = int(np.argmax([k, o, r]))
        return Residency(*(1 if i == best else 0 for i in range(3)))
    unit = max(1, min(problem.slice_tokens, a.tokens))
    slack = 1e-6 * a.tokens
    kept = min(a.tokens, int((k * a.tokens + slack) // unit) * unit if k < 1 - 1e-6 else a.tokens)
    offloaded = min(a.tokens - kept, int((o * a.tokens + slack) // unit) * unit if o < 1 - 1e-6 else a.tokens)
    if a.recompute_whole and r > 0.5:
        return Residency(0, 0, a.tokens)
    rest = a.tokens - kept - offloaded
    if not rest:
        return Residency(kept, offloaded, 0)
    sliced = a.recompute_seconds is not None and not a.recompute_whole
    if sliced and (r > 1e-6 or not a.can_offload or o < 1e-6):
        return Residency(kept, offloaded, rest)
    if a.can_offload:
        return Residency(kept, offloaded + rest, 0)
    return Residency(kept + rest, offloaded, 0)


def with_budget(problem: Problem, budget: int | None) -> Problem:
    """The same problem under another budget."""
    return replace(problem, budget=budget)
