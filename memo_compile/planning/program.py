"""The linear program: how much of each saved activation is kept, offloaded, recomputed.

Pure functions over plain data; nothing here knows of graphs. Time is a row of steps, forward then backward, merged into
intervals between which nothing is born or dies. All state is carried from interval to interval, so that the matrix is
sparse: a few entries a row, however many activations there are. A stall stands before its interval; both engines run on
in it, as they do while something is recomputed.

For activation a: bytes b, fractions k (kept), o (offloaded), r (recomputed), k + o + r = 1.

* memory   its bytes are live on [produced, last_forward] and on [first_backward, last_backward] whole, k·b in between;
           calls beside this one hold k·b each, all along;
           with it go the slices that wait for the D2H engine and those that landed early or are landing
           where the least is wanted, o·b less in ranges of steps that do not read it: it comes once more
* out      slices can leave from the interval after the one that makes them. The engine takes them in the order in
           which their bytes must be gone, so that what is overdue is all that was due less all that was copied
* in       slices land before their first use, in the order of their first uses
* turn     nothing comes back before it has left. What leaves last is needed first, so that one engine has stopped when
           the other starts: in an interval, and in a stall, their seconds add up. And where a is needed, it and all
           that left ahead of it must be out; only of what is offloaded at all, which the first answer tells
* host     Σ o·b ≤ host budget, for each call its share
* least    Σ r · recompute seconds + Σ stalls + a tie-break on the bytes moved

The fractions are then rounded to slices, and the program is solved again with them fixed: that tells what the stalls
are, and that every row still holds. Where one does not, the budget is lowered by the excess and all is decided again.

After DESIGN: MEMO (SIGMOD 2025) section 4.2 has one fraction for all tensors and the memory and host rows only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memo_compile.errors import SolverOutOfTime
from memo_compile.passes.transforms.residency import Residency
from memo_compile.placement.highs import quiet_highs
from memo_compile.planning.columns import UNIT, Columns, Grid, Scale
from memo_compile.planning.residency import Problem
from memo_compile.planning.rows import Limited, Rows, last_copy, rows_of_time
from memo_compile.schema import Binding

TIE_BREAK = 1e-4  # of the seconds that a transfer takes: enough to prefer fewer bytes, too little to pay for them


@dataclass(frozen=True)
class Answer:
    fractions: np.ndarray[Any, Any]  # (activations, 3): kept, offloaded, recomputed
    peak: float
    stall: float
    lost: float  # seconds of stalls and recomputation
    prices: dict[Binding, float]


def solve(
    problem: Problem,
    grid: Grid,
    budget: float | None,
    time_limit: float,
    fixed: Mapping[str, Residency] | None = None,
    offloaded: frozenset[str] = frozenset(),
) -> Answer | None:
    """Solve for the least time within `budget`, or with None for the least peak; None where there is no solution.

    With `fixed` homes only transfers and stalls are left to choose, and among equals the least peak is taken.
    `offloaded` are known to be so, in part at least: they must be out when they are needed.
    Bytes are scaled to MiB and seconds to thousandths of the step, so that the solver's tolerances are small beside
    both.
    """
    scale = Scale.of(problem)
    c = Columns.of(len(problem.activations), len(grid.start))
    cost, lower, upper, integral = _bounds(problem, grid, c, scale, fixed)
    rows = Rows()
    for i in range(c.activations):
        rows.add({c.kept + i: 1.0, c.offloaded + i: 1.0, c.recomputed + i: 1.0}, 1.0, 1.0)
    place = {a.name: i for i, a in enumerate(problem.activations)}
    for first, *others in problem.alike if fixed is None else ():
        for column in (c.kept, c.offloaded):
            for other in others:
                rows.add({column + place[first]: 1.0, column + place[other]: -1.0}, 0.0, 0.0)
    if fixed is not None:
        offloaded = frozenset(name for name, home in fixed.items() if home.offloaded)
    memory_rows, rates = rows_of_time(problem, grid, c, scale, rows, offloaded if budget is not None else None)
    host = {c.offloaded + i: a.bytes / UNIT for i, a in enumerate(problem.activations)}
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
    solution = _solution(highs, _model(cost=cost, lower=lower, upper=upper, integral=integral, rows=rows), time_limit)
    if solution is None:
        return None
    values = np.array(solution.col_value)
    columns_of = (slice(c.kept, c.offloaded), slice(c.offloaded, c.recomputed), slice(c.recomputed, c.live))
    fractions = np.stack([values[home] for home in columns_of], axis=1)
    prices: dict[Binding, float] = {b: 0.0 for b in Binding if b is not Binding.NOTHING}
    if budget is not None and fixed is None:
        # An integer program has no duals: prices are those of the same program with all fractions free.
        relaxed = solution
        if integral.any():
            relaxed = _solution(
                highs,
                _model(cost=cost, lower=lower, upper=upper, integral=np.zeros_like(integral), rows=rows),
                time_limit,
            )
        if relaxed is not None and relaxed.dual_valid:
            duals, at = np.array(relaxed.row_dual), np.array(relaxed.col_value)
            prices = _prices(duals, at, memory_rows, host_row, rates, scale)
    stall = scale.tick * float(values[c.stall : c.stall + c.intervals].sum())
    recompute = sum((a.recompute_seconds or 0.0) * fractions[i, 2] for i, a in enumerate(problem.activations))
    return Answer(np.clip(fractions, 0.0, 1.0), values[c.top] * UNIT, stall, stall + recompute, prices)


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


def _bounds(
    problem: Problem, grid: Grid, c: Columns, scale: Scale, fixed: Mapping[str, Residency] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Costs, lower and upper bounds, and which variables are whole numbers."""
    cost, lower, upper = np.zeros(c.count), np.zeros(c.count), np.full(c.count, math.inf)
    integral = np.zeros(c.count, dtype=bool)
    for i, a in enumerate(problem.activations):
        columns = [c.kept + i, c.offloaded + i, c.recomputed + i]
        cost[c.offloaded + i] = TIE_BREAK * a.bytes / UNIT * (1 / scale.out_rate + 1 / scale.in_rate)
        cost[c.recomputed + i] = (a.recompute_seconds or 0.0) / scale.tick
        if fixed is not None:
            home = fixed[a.name]
            lower[columns] = np.array([home.kept, home.offloaded, home.recomputed]) / a.tokens
            upper[columns] = lower[columns]
            continue
        upper[columns] = [float(a.can_stay), float(a.can_offload), float(a.recompute_seconds is not None)]
        if a.tokens == 1:
            integral[columns] = True
        elif a.recompute_whole:
            integral[c.recomputed + i] = a.recompute_seconds is not None
    cost[c.stall : c.stall + c.intervals] = 1.0
    lower[c.overdue : c.overdue + c.intervals] = -math.inf
    last = last_copy(grid, c)
    if last < c.intervals:
        upper[c.waiting + last - 1] = 0.0
    for column in (c.out_stalled, c.out, c.waiting, c.overdue, c.held):
        lower[column + last : column + c.intervals] = upper[column + last : column + c.intervals] = 0.0
    for column in (c.back_stalled, c.back, c.early):
        upper[column : column + grid.forward] = 0.0
    return cost, lower, upper, integral


def _model(
    cost: np.ndarray[Any, Any],
    lower: np.ndarray[Any, Any],
    upper: np.ndarray[Any, Any],
    integral: np.ndarray[Any, Any],
    rows: Rows,
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
    rates: Mapping[Binding, list[Limited]],
    scale: Scale,
) -> dict[Binding, float]:
    """Seconds saved by one more GiB or GB/s. A dual is the change of the objective as its row's bound is raised."""
    prices = {
        Binding.DEVICE_MEMORY: scale.tick * 1024 * max(0.0, -float(sum(duals[r] for r in memory))),
        Binding.HOST_MEMORY: scale.tick * 1024 * max(0.0, -float(duals[host])),
    }
    for kind, limited in rates.items():
        # One more GB/s raises the bound by 1e9 bytes for each second that the row's time lasts.
        ticks = sum(
            duals[r] * (constant + sum(v * values[k] for k, v in time.items())) for r, time, constant in limited
        )
        prices[kind] = scale.tick * max(0.0, -float(ticks)) * 1e9 / UNIT * scale.tick
    return prices
