"""The linear program: how much of each saved activation is kept, offloaded, recomputed.

Pure functions over plain data; nothing here knows of graphs. Time is a row of steps, forward then backward, merged into
intervals between which nothing is born or dies. All state is carried from interval to interval, so that the matrix is
sparse: a few entries a row, however many activations there are. A stall stands before its interval; both engines run on
in it, as they do while something is recomputed.

For activation a: bytes b, fractions k (kept), o (offloaded), r (recomputed), k + o + r = 1.

* memory   its bytes are live on [produced, last_forward] and on [first_backward, last_backward] whole, k·b in between;
           with it go the slices that wait for the D2H engine and those that landed early or are landing
* out      slices can leave from the interval behind the one that makes them. The engine takes them in the order in
           which their bytes must be gone, so that what is overdue is all that was due less all that was copied
* in       slices land before their first use, in the order of their first uses
* turn     nothing comes back before it has left. What leaves last is needed first, so that one engine has stopped when
           the other starts: in an interval, and in a stall, their seconds add up. And where a is needed, it and all
           that left ahead of it must be out; only of what is offloaded at all, which the first answer tells
* host     Σ o·b ≤ host budget
* least    Σ r · recompute seconds + Σ stalls + a tie-break on the bytes moved

The fractions are then rounded to slices, and the program is solved again with them fixed: that tells what the stalls
are, and that every row still holds. Where one does not, the budget is lowered by the excess and all is decided again.

After DESIGN: MEMO (SIGMOD 2025) section 4.2 has one fraction for all tensors and the memory and host rows only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from memo_compile.errors import SolverOutOfTime
from memo_compile.placement.highs import quiet_highs

SLACK = 0.0005  # of the smallest peak: room in which the least plan may choose the faster of two
ROUNDING = 1e-3  # of the step: what rounding may cost before another way to round is tried
ROUNDS = 4  # of rounding and lowering the target by what it broke
DRAIN = 40  # intervals of the backward in which offloads may still run, at least
UNIT = float(2**20)  # bytes
TIE_BREAK = 1e-4  # of the seconds that a transfer takes: enough to prefer fewer bytes, too little to pay for them


@dataclass(frozen=True)
class Activation:
    """One saved activation. Steps are indices on the timeline; `tokens` = 1 means that it has one home, whole.

    `first_backward` is the first step that needs it, be it for a gradient or to recompute another activation.
    `recompute_seconds` is None where it must not be made again; with `recompute_whole` it is made again whole or not
    at all, while its rows may be kept and offloaded in slices. With `can_stay` false none of it is kept.
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
    can_stay: bool = True


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
    """The program's answer.

    `seconds` is the predicted step, `peak` the least memory in which it takes no longer, transfers included. `prices`
    are the duals: the seconds that one more GiB of "device memory" or "host memory", or one more GB/s of "offload rate"
    or "prefetch rate" would save. `binding` names the one that costs most in proportion: price times what there is.
    """

    residency: dict[str, Residency]
    peak: int
    seconds: float
    stall_seconds: float
    recompute_seconds: float
    binding: str
    prices: Mapping[str, float]
    solver_seconds: float


def decide(problem: Problem, *, time_limit: float = 10.0) -> Decision | None:
    """The fastest residency within the budget; None where the program has no solution.

    Raises:
        SolverOutOfTime: no answer within `time_limit` seconds, and it is not known whether there is one.
    """
    started = time.perf_counter()
    grid = _grid(problem)
    budget = float("inf") if problem.budget is None else float(problem.budget)
    settled = _settled(problem, grid, budget, time_limit)
    return None if settled is None else _decision(problem, *settled, time.perf_counter() - started)


def least(problem: Problem, *, time_limit: float = 10.0) -> Decision:
    """The residency with the smallest peak as it rounds, without a search for the fastest of such: told soon.

    Raises:
        SolverOutOfTime: no answer within `time_limit` seconds.
    """
    started = time.perf_counter()
    grid = _grid(problem)
    free = _least(problem, grid, time_limit)
    homes = _round_all(problem, free, again=False)
    # Without a bound transfers would run ahead of time for nothing; but slices may be too coarse for this one.
    within = _solve(problem, grid, slightly_more(free.peak), time_limit, homes)
    fixed = within or _solve(problem, grid, math.inf, time_limit, homes) or free
    return _decision(problem, homes, free, fixed, time.perf_counter() - started)


def _least(problem: Problem, grid: _Grid, time_limit: float) -> _Answer:
    answer = _solve(problem, grid, None, time_limit)
    assert answer is not None, "without a budget everything can be kept"
    return answer


def smallest_peak(problem: Problem, *, time_limit: float = 10.0) -> float:
    """The fewest bytes in which any fractions run, however long: what stalls for every copy needs.

    Raises:
        SolverOutOfTime: no answer within `time_limit` seconds.
    """
    return _least(problem, _grid(problem), time_limit).peak


def slightly_more(peak: float) -> float:
    """Bytes in which a plan with that peak may choose the faster of two."""
    return peak * (1 + SLACK) + 4096


def evaluate(problem: Problem, residency: Mapping[str, Residency], *, time_limit: float = 10.0) -> Decision | None:
    """What the program predicts for given homes; None where they break a constraint."""
    started = time.perf_counter()
    budget = float("inf") if problem.budget is None else float(problem.budget)
    answer = _solve(problem, _grid(problem), budget, time_limit, residency)
    if answer is None:
        return None
    return _decision(problem, residency, answer, answer, time.perf_counter() - started)


def all_offloaded(problem: Problem, *, time_limit: float = 10.0) -> Decision:
    """Everything that can leave does, whatever it costs; the host arena says so where it does not fit."""
    away = {
        a.name: Residency(0, a.tokens, 0) if a.can_offload else Residency(a.tokens, 0, 0) for a in problem.activations
    }
    unlimited = replace(problem, budget=None, host_budget=sum(a.bytes for a in problem.activations))
    decision = evaluate(unlimited, away, time_limit=time_limit)
    assert decision is not None, "without budgets everything can be offloaded"
    return decision


def _settled(problem: Problem, grid: _Grid, budget: float, time_limit: float) -> _Settled | None:
    """Homes in whole slices that keep every row."""
    target, host = budget, float(problem.host_budget)
    for _ in range(ROUNDS):
        best: _Settled | None = None
        left: frozenset[str] = frozenset()
        for _ in range(2):
            free = _solve(replace(problem, host_budget=max(0, int(host))), grid, target, time_limit, left=left)
            if free is None:
                return best
            for again in (False, True):
                homes = _round_all(problem, free, again=again)
                fixed = _solve(problem, grid, budget, time_limit, homes)
                if fixed and (best is None or _lost(problem, homes, fixed) < _lost(problem, best[0], best[2])):
                    best = homes, free, fixed
                if best and _lost(problem, best[0], best[2]) <= free.lost + ROUNDING * sum(problem.seconds):
                    return best
            if best is None:
                break
            # Once more, knowing what is offloaded, and so must be out before it is needed.
            left = frozenset(name for name, home in homes.items() if home.offloaded)
        if best is not None:
            return best
        slices = [a.bytes * min(problem.slice_tokens, a.tokens) / a.tokens for a in problem.activations]
        # A row holds a few roundings at once; the larger the room taken back, the fewer rounds.
        target -= max(sorted(slices)[-8:], default=0.0) + max(0.0, max(memory_profile(problem, homes)) - budget)
        offloaded = sum(a.bytes * homes[a.name].offloaded / a.tokens for a in problem.activations)
        host -= max(0.0, offloaded - problem.host_budget)
    return None


def _lost(problem: Problem, homes: Mapping[str, Residency], fixed: _Answer) -> float:
    """Seconds beyond the step's own."""
    return fixed.stall + _recompute_seconds(problem, homes)


def _recompute_seconds(problem: Problem, homes: Mapping[str, Residency]) -> float:
    return sum((a.recompute_seconds or 0.0) * homes[a.name].recomputed / a.tokens for a in problem.activations)


def _round_all(problem: Problem, answer: _Answer, *, again: bool) -> dict[str, Residency]:
    """Whole slices for all. Where a slice may only be kept or offloaded, the two take turns, so that neither the
    device's nor the host's sum strays by more than a slice.
    """
    homes: dict[str, Residency] = {}
    over = 0.0  # bytes offloaded beyond the answer
    for i, a in enumerate(problem.activations):
        home = _rounded(a, answer, i, problem, again=again, up=over <= 0)
        homes[a.name] = home
        over += a.bytes * (home.offloaded / a.tokens - float(answer.fractions[i, 1]))
    return homes


def _decision(
    problem: Problem, residency: Mapping[str, Residency], free: _Answer, fixed: _Answer, solver_seconds: float
) -> Decision:
    recompute = _recompute_seconds(problem, residency)
    amounts = {
        "device memory": (problem.budget or 0) / 2**30,
        "host memory": problem.host_budget / 2**30,
        "offload rate": problem.d2h / 1e9,
        "prefetch rate": problem.h2d / 1e9,
    }
    worth = {key: price * amounts[key] for key, price in free.prices.items()}
    return Decision(
        dict(residency),
        int(fixed.peak),
        sum(problem.seconds) + recompute + fixed.stall,
        fixed.stall,
        recompute,
        max(worth, key=lambda key: worth[key]) if any(worth.values()) else "nothing",
        free.prices,
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
        edges |= {a.produced, a.produced + 1, a.last_forward + 1, a.first_backward, a.last_backward + 1}
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
    lost: float  # seconds of stalls and recomputation
    prices: dict[str, float]


_Settled = tuple[dict[str, Residency], _Answer, _Answer]  # homes, the answer that they round, the answer for them


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


def _solve(
    problem: Problem,
    grid: _Grid,
    budget: float | None,
    time_limit: float,
    fixed: Mapping[str, Residency] | None = None,
    left: frozenset[str] = frozenset(),
) -> _Answer | None:
    """Solve for the least time within `budget`, or with None for the least peak; None where there is no solution.

    With `fixed` homes only transfers and stalls are left to choose, and among equals the least peak is taken. `left`
    are activations that are offloaded, in part at least: they must be out when they are needed.
    Bytes are scaled to MiB and seconds to thousandths of the step, so that the solver's tolerances are small beside
    both.
    """
    scale = _Scale.of(problem)
    c = _Columns.of(len(problem.activations), len(grid.start))
    cost, lower, upper, integral = _bounds(problem, grid, c, scale, fixed)
    rows = _Rows()
    for i in range(c.activations):
        rows.add({c.kept + i: 1.0, c.away + i: 1.0, c.again + i: 1.0}, 1.0, 1.0)
    if fixed is not None:
        left = frozenset(name for name, home in fixed.items() if home.offloaded)
    memory_rows, rates = _rows_of_time(problem, grid, c, scale, rows, left if budget is not None else None)
    host = {c.away + i: a.bytes / UNIT for i, a in enumerate(problem.activations)}
    host_row = rows.add(host, -math.inf, max(problem.host_budget, 0) / UNIT * (1 + (1e-9 if fixed else 0)))
    if budget is None:  # the smallest peak first; seconds only break ties
        cost = cost * 1e-6
        cost[c.top] = 1.0
    else:
        upper[c.top] = budget / UNIT * (1 + (1e-9 if fixed else 0))
        if fixed is not None:
            cost[c.top] = 1e-3 / max(1.0, float(grid.base.max()) / UNIT)
    highs = quiet_highs(time_limit)
    highs.setOptionValue("mip_rel_gap", 1e-3)
    solution = _solution(highs, _model(cost, lower, upper, integral, rows), time_limit)
    if solution is None:
        return None
    values = np.array(solution.col_value)
    fractions = np.stack([values[c.kept : c.away], values[c.away : c.again], values[c.again : c.live]], axis=1)
    prices = dict.fromkeys(("device memory", "host memory", "offload rate", "prefetch rate"), 0.0)
    if budget is not None and fixed is None:
        # An integer program has no duals: prices are those of the same program with all fractions free.
        relaxed = solution
        if integral.any():
            relaxed = _solution(highs, _model(cost, lower, upper, np.zeros_like(integral), rows), time_limit)
        if relaxed is not None and relaxed.dual_valid:
            duals, at = np.array(relaxed.row_dual), np.array(relaxed.col_value)
            prices = _prices(duals, at, memory_rows, host_row, rates, scale)
    stall = scale.tick * float(values[c.stall : c.stall + c.intervals].sum())
    again = sum((a.recompute_seconds or 0.0) * fractions[i, 2] for i, a in enumerate(problem.activations))
    return _Answer(np.clip(fractions, 0.0, 1.0), values[c.top] * UNIT, stall, stall + again, prices)


def _solution(highs: Any, model: Any, time_limit: float) -> Any | None:
    """HiGHS's solution, the best so far where time ran out; None where it proves that there is none.

    Time is the processor's, so that a busy machine makes the same plan: HiGHS's own limit is of the clock, and is set
    anew while the processor's is not used up.

    Raises:
        SolverOutOfTime: time ran out before anything feasible was found.
    """
    import highspy  # loads HiGHS

    statuses = highspy.HighsModelStatus
    highs.passModel(model)
    started = time.process_time()
    highs.run()
    while highs.getModelStatus() == statuses.kTimeLimit and time.process_time() - started < time_limit:
        highs.setOptionValue("time_limit", highs.getRunTime() + time_limit)
        highs.run()
    status = highs.getModelStatus()
    if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
        return None
    feasible = highs.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if status != statuses.kOptimal and not feasible:
        raise SolverOutOfTime(time_limit)
    return highs.getSolution()


@dataclass(frozen=True)
class _Scale:
    """`tick` seconds are one unit of time; rates in MiB a tick."""

    tick: float
    out_rate: float
    in_rate: float

    @staticmethod
    def of(problem: Problem) -> _Scale:
        tick = max(sum(problem.seconds), 1e-12) / 1000
        return _Scale(tick, problem.d2h / UNIT * tick, problem.h2d / UNIT * tick)


@dataclass(frozen=True)
class _Columns:
    """Where each kind of variable begins. All but the first three have one for each interval."""

    activations: int
    intervals: int
    kept: int
    away: int
    again: int
    live: int  # MiB of activations
    stall: int  # ticks before the interval
    out_stalled: int  # copied to the host in the stall
    out: int  # copied to the host during the interval
    waiting: int  # made and not copied, behind the interval
    overdue: int  # due less copied, behind the interval; below 0 where copies are ahead
    held: int  # overdue at the start of the interval
    back_stalled: int  # landed in the stall
    back: int  # landed during the interval
    early: int  # landed and not yet used, behind the interval
    top: int  # the peak
    count: int

    @staticmethod
    def of(n: int, m: int) -> _Columns:
        a, b, d, e, f, g, h, i, j, k, top = (3 * n + place * m for place in range(11))
        return _Columns(n, m, 0, n, 2 * n, a, b, d, e, f, g, h, i, j, k, top, top + 1)


def _bounds(
    problem: Problem, grid: _Grid, c: _Columns, scale: _Scale, fixed: Mapping[str, Residency] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Costs, lower and upper bounds, and which variables are whole numbers."""
    cost, lower, upper = np.zeros(c.count), np.zeros(c.count), np.full(c.count, math.inf)
    integral = np.zeros(c.count, dtype=bool)
    for i, a in enumerate(problem.activations):
        columns = [c.kept + i, c.away + i, c.again + i]
        cost[c.away + i] = TIE_BREAK * a.bytes / UNIT * (1 / scale.out_rate + 1 / scale.in_rate)
        cost[c.again + i] = (a.recompute_seconds or 0.0) / scale.tick
        if fixed is not None:
            home = fixed[a.name]
            lower[columns] = np.array([home.kept, home.offloaded, home.recomputed]) / a.tokens
            upper[columns] = lower[columns]
            continue
        upper[columns] = [float(a.can_stay), float(a.can_offload), float(a.recompute_seconds is not None)]
        if a.tokens == 1:
            integral[columns] = True
        elif a.recompute_whole:
            integral[c.again + i] = a.recompute_seconds is not None
    cost[c.stall : c.stall + c.intervals] = 1.0
    lower[c.overdue : c.overdue + c.intervals] = -math.inf
    last = _last_copy(grid, c)
    if last < c.intervals:
        upper[c.waiting + last - 1] = 0.0
    for column in (c.out_stalled, c.out, c.waiting, c.overdue, c.held):
        lower[column + last : column + c.intervals] = upper[column + last : column + c.intervals] = 0.0
    for column in (c.back_stalled, c.back, c.early):
        upper[column : column + grid.forward] = 0.0
    return cost, lower, upper, integral


def _last_copy(grid: _Grid, c: _Columns) -> int:
    """The interval from which on nothing leaves any more: what is away so late would be back at once."""
    return min(c.intervals, grid.forward + max(DRAIN, (c.intervals - grid.forward) // 8))


Changes = list[dict[int, float]]


def _events(
    problem: Problem, grid: _Grid, c: _Columns, left: frozenset[str]
) -> tuple[Changes, np.ndarray[Any, Any], Changes, Changes, Changes]:
    """What changes at the start of each interval: live bytes (with a constant), released, due and needed slices.

    Where it is known what is offloaded (`left`), nothing waits behind the rest.
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
        constant[born] += size
        constant[gone] -= size
        constant[back] += size
        constant[dead] -= size
        changes[gone][c.kept + i] = changes[gone].get(c.kept + i, 0.0) + size
        changes[back][c.kept + i] = changes[back].get(c.kept + i, 0.0) - size
        # The engine's order is that of the due times: what is due later leaves after what is due before.
        here = max(ready, min(grid.of_step[min(a.produced + 1, steps)], gone))
        ready = here if not left or a.name in left else ready
        released[here][c.away + i] = size
        due[gone][c.away + i] = size
        needed[back][c.away + i] = size
    return changes, constant, released, due, needed


def _out_first(problem: Problem, grid: _Grid, c: _Columns, left: frozenset[str]) -> dict[int, dict[int, float]]:
    """By interval in which an activation of `left` is needed: what may still wait, since it leaves later."""
    queue = _queue(problem)
    behind: dict[int, float] = {}
    may_wait: list[dict[int, float]] = []
    for i in reversed(queue):
        may_wait.append(dict(behind))
        behind[c.away + i] = -problem.activations[i].bytes / UNIT
    place = {i: n for n, i in enumerate(queue)}
    rows: dict[int, dict[int, float]] = {}
    farthest = -1
    for i in sorted(queue, key=lambda i: (problem.activations[i].first_backward, -place[i])):
        if problem.activations[i].name in left and place[i] > farthest:
            farthest = place[i]
            rows.setdefault(int(grid.of_step[problem.activations[i].first_backward]), may_wait[-1 - place[i]])
    return rows


def _queue(problem: Problem) -> list[int]:
    """Activations in the order in which they leave: that of their last uses in the forward."""
    activations = problem.activations
    return sorted(range(len(activations)), key=lambda i: (activations[i].last_forward, activations[i].produced))


Limited = tuple[int, dict[int, float], float]  # a row, and by how much a rate one larger raises its bound: Σ v·x + c


def _rows_of_time(
    problem: Problem, grid: _Grid, c: _Columns, scale: _Scale, rows: _Rows, left: frozenset[str] | None
) -> tuple[list[int], dict[str, list[Limited]]]:
    """Rows for each interval. Returns those of memory, and those that a rate limits.

    `left` are the activations known to be offloaded; with None transfers are instantaneous, as if stalls cost nothing.
    """
    changes, constant, released, due, needed = _events(problem, grid, c, left or frozenset())
    again: Changes = [{} for _ in range(c.intervals + 1)]
    for i, a in enumerate(problem.activations):
        if a.recompute_seconds:
            again[grid.of_step[a.first_backward]][c.again + i] = a.recompute_seconds / scale.tick
    memory: list[int] = []
    rates: dict[str, list[Limited]] = {"offload rate": [], "prefetch rate": []}
    last = _last_copy(grid, c)
    out_first = _out_first(problem, grid, c, left or frozenset())

    def limited(kind: str, column: int, rate: float, time_of: dict[int, float], constant: float) -> None:
        row = rows.add({column: 1.0, **{k: -rate * v for k, v in time_of.items()}}, -math.inf, rate * constant)
        rates[kind].append((row, time_of, constant))

    def in_turn(out: int, back: int, time_of: dict[int, float], constant: float) -> None:
        """One engine after the other."""
        of_time = {k: -v for k, v in time_of.items()}
        row = rows.add({out: 1 / scale.out_rate, back: 1 / scale.in_rate, **of_time}, -math.inf, constant)
        # A rate larger by d takes d · amount / rate² off the seconds.
        rates["offload rate"].append((row, {out: scale.out_rate**-2}, 0.0))
        rates["prefetch rate"].append((row, {back: scale.in_rate**-2}, 0.0))

    for i in range(c.intervals):
        before = i > 0
        row = {c.live + i: 1.0, **{k: -v for k, v in changes[i].items()}}
        rows.add({**row, **({c.live + i - 1: -1.0} if before else {})}, constant[i], constant[i])
        if left is None:
            rows.add({c.live + i: 1.0, c.top: -1.0}, -math.inf, -grid.base[i] / UNIT)
            continue
        seconds = float(grid.seconds[i]) / scale.tick
        stalled = {c.stall + i: 1.0}
        if grid.forward <= i < last:
            in_turn(c.out_stalled + i, c.back_stalled + i, stalled, 0.0)
            in_turn(c.out + i, c.back + i, again[i], seconds)
        elif i < last:
            limited("offload rate", c.out_stalled + i, scale.out_rate, stalled, 0.0)
            limited("offload rate", c.out + i, scale.out_rate, again[i], seconds)
        elif i >= grid.forward:
            limited("prefetch rate", c.back_stalled + i, scale.in_rate, stalled, 0.0)
            limited("prefetch rate", c.back + i, scale.in_rate, again[i], seconds)
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


def _model(
    cost: np.ndarray[Any, Any],
    lower: np.ndarray[Any, Any],
    upper: np.ndarray[Any, Any],
    integral: np.ndarray[Any, Any],
    rows: _Rows,
) -> Any:
    import highspy  # loads HiGHS

    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(cost), len(rows.lower)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, lower, upper
    lp.row_lower_, lp.row_upper_ = np.array(rows.lower), np.array(rows.upper)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array(rows.starts, dtype=np.int32)
    lp.a_matrix_.index_ = np.array(rows.index, dtype=np.int32)
    lp.a_matrix_.value_ = np.array(rows.value)
    if integral.any():
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if flag else kinds.kContinuous for flag in integral]
    return lp


def _prices(
    duals: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
    memory: list[int],
    host: int,
    rates: Mapping[str, list[Limited]],
    scale: _Scale,
) -> dict[str, float]:
    """Seconds saved by one more GiB or GB/s. A dual is the change of the objective as its row's bound is raised."""
    prices = {
        "device memory": scale.tick * 1024 * max(0.0, -float(sum(duals[r] for r in memory))),
        "host memory": scale.tick * 1024 * max(0.0, -float(duals[host])),
    }
    for kind, limited in rates.items():
        # One more GB/s raises the bound by 1e9 bytes for each second that the row's time lasts.
        ticks = sum(
            duals[r] * (constant + sum(v * values[k] for k, v in time.items())) for r, time, constant in limited
        )
        prices[kind] = scale.tick * max(0.0, -float(ticks)) * 1e9 / UNIT * scale.tick
    return prices


def _rounded(a: Activation, answer: _Answer, index: int, problem: Problem, *, again: bool, up: bool) -> Residency:
    """Whole slices. What is kept and offloaded is rounded down, so that no row of memory breaks; what is left over
    goes to a home that is open to it: recomputation with `again` or where nothing is offloaded, else the host, or with
    `up` false the device.
    """
    k, o, r = answer.fractions[index]
    if a.tokens == 1:
        best = int(np.argmax([k, o, r]))
        return Residency(*(1 if i == best else 0 for i in range(3)))
    if a.recompute_whole and r > 0.5:
        return Residency(0, 0, a.tokens)
    unit = max(1, min(problem.slice_tokens, a.tokens))
    slack = 1e-6 * a.tokens
    kept = min(a.tokens, int((k * a.tokens + slack) // unit) * unit if k < 1 - 1e-6 else a.tokens)
    offloaded = min(a.tokens - kept, int((o * a.tokens + slack) // unit) * unit if o < 1 - 1e-6 else a.tokens)
    rest = a.tokens - kept - offloaded
    sliced = a.recompute_seconds is not None and not a.recompute_whole
    if sliced and (again or r > 1e-6 or not a.can_offload or not offloaded):
        return Residency(kept, offloaded, rest)
    if a.can_offload and (up or not k > 1e-6):
        return Residency(kept, offloaded + rest, 0)
    return Residency(kept + rest, offloaded, 0)


def with_budget(problem: Problem, budget: int | None) -> Problem:
    """The same problem under another budget."""
    return replace(problem, budget=budget)
