"""Decisions: fractions rounded to slices, the program solved again with them fixed, and what that comes to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning.columns import Grid, grid_of
from memo_compile.planning.program import Answer, solve
from memo_compile.planning.residency import Activation, Decision, Problem, memory_profile
from memo_compile.schema import Binding

SLACK = 0.0005  # of the smallest peak: room in which the least plan may choose the faster of two


ROUNDING = 1e-3  # of the step: what rounding may cost before another way to round is tried


ROUNDS = 4  # of rounding and lowering the target by what it broke


def decide(problem: Problem, *, time_limit: float = 10.0) -> Decision | None:
    """The fastest residency within the budget; None where the program has no solution.

    Raises:
        SolverOutOfTime: no answer within `time_limit` seconds, and it is not known whether there is one.
    """
    started = time.perf_counter()
    grid = grid_of(problem)
    budget = float("inf") if problem.budget is None else float(problem.budget)
    rounding = _rounded_within(problem, grid, budget, time_limit)
    return None if rounding is None else _decision(problem, *rounding, time.perf_counter() - started)


def least(problem: Problem, *, time_limit: float = 10.0) -> Decision:
    """The residency with the smallest peak as it rounds, without a search for the fastest of such: told soon.

    Raises:
        SolverOutOfTime: no answer within `time_limit` seconds.
    """
    started = time.perf_counter()
    grid = grid_of(problem)
    free = _least(problem, grid, time_limit)
    residency = _round_all(problem, free, recompute_rest=False)
    # Without a bound transfers would run ahead of time for nothing; but slices may be too coarse for this one.
    within = solve(problem, grid, slightly_more(free.peak), time_limit, residency)
    fixed = within or solve(problem, grid, math.inf, time_limit, residency) or free
    return _decision(problem, residency, free, fixed, time.perf_counter() - started)


def _least(problem: Problem, grid: Grid, time_limit: float) -> Answer:
    answer = solve(problem, grid, None, time_limit)
    assert answer is not None, "without a budget everything can be kept"
    return answer


def smallest_peak(problem: Problem, *, time_limit: float = 10.0) -> float:
    """The fewest bytes in which any fractions run, however long: what stalls for every copy needs.

    Raises:
        SolverOutOfTime: no answer within `time_limit` seconds.
    """
    return _least(problem, grid_of(problem), time_limit).peak


def slightly_more(peak: float) -> float:
    """Bytes in which a plan with that peak may choose the faster of two."""
    return peak * (1 + SLACK) + 4096


def evaluate(problem: Problem, residency: Mapping[str, Residency], *, time_limit: float = 10.0) -> Decision | None:
    """What the program predicts for given homes; None where they break a constraint."""
    started = time.perf_counter()
    budget = float("inf") if problem.budget is None else float(problem.budget)
    answer = solve(problem, grid_of(problem), budget, time_limit, residency)
    if answer is None:
        return None
    return _decision(problem, residency, answer, answer, time.perf_counter() - started)


def all_offloaded(problem: Problem, *, time_limit: float = 10.0) -> Decision:
    """Everything that can leave does, whatever it costs; the host arena says so where it does not fit."""
    offloaded = {
        a.name: Residency(0, a.tokens, 0) if a.can_offload else Residency(a.tokens, 0, 0) for a in problem.activations
    }
    unlimited = replace(problem, budget=None, host_budget=sum(a.bytes for a in problem.activations))
    decision = evaluate(unlimited, offloaded, time_limit=time_limit)
    assert decision is not None, "without budgets everything can be offloaded"
    return decision


def _rounded_within(problem: Problem, grid: Grid, budget: float, time_limit: float) -> _Rounding | None:
    """Homes in whole slices that keep every row."""
    target, host = budget, float(problem.host_budget)
    for _ in range(ROUNDS):
        best: _Rounding | None = None
        known: frozenset[str] = frozenset()
        for _ in range(2):
            free = solve(replace(problem, host_budget=max(0, int(host))), grid, target, time_limit, offloaded=known)
            if free is None:
                return best
            for recompute_rest in (False, True):
                residency = _round_all(problem, free, recompute_rest=recompute_rest)
                fixed = solve(problem, grid, budget, time_limit, residency)
                if fixed and (best is None or _lost(problem, residency, fixed) < _lost(problem, best[0], best[2])):
                    best = residency, free, fixed
                if best and _lost(problem, best[0], best[2]) <= free.lost + ROUNDING * sum(problem.seconds):
                    return best
            if best is None:
                break
            # Once more, knowing what is offloaded, and so must be out before it is needed.
            known = frozenset(name for name, home in residency.items() if home.offloaded)
        if best is not None:
            return best
        slices = [a.bytes * min(problem.slice_tokens, a.tokens) / a.tokens for a in problem.activations]
        # A row holds a few roundings at once; the larger the room taken back, the fewer rounds.
        target -= max(sorted(slices)[-8:], default=0.0) + max(0.0, max(memory_profile(problem, residency)) - budget)
        offloaded = sum(a.bytes * residency[a.name].offloaded / a.tokens for a in problem.activations)
        host -= max(0.0, offloaded - problem.host_budget)
    return None


def _lost(problem: Problem, residency: Mapping[str, Residency], fixed: Answer) -> float:
    """Seconds beyond the step's own."""
    return fixed.stall + _recompute_seconds(problem, residency)


def _recompute_seconds(problem: Problem, residency: Mapping[str, Residency]) -> float:
    return sum((a.recompute_seconds or 0.0) * residency[a.name].recomputed / a.tokens for a in problem.activations)


def _round_all(problem: Problem, answer: Answer, *, recompute_rest: bool) -> dict[str, Residency]:
    """Whole slices for all. Where a slice may only be kept or offloaded, the two take turns, so that neither the
    device's nor the host's sum strays by more than a slice. What is alike has one home.
    """
    residency: dict[str, Residency] = {}
    first = {name: names[0] for names in problem.alike for name in names}
    over = 0.0  # bytes offloaded beyond the answer
    for i, a in enumerate(problem.activations):
        home = residency.get(first.get(a.name, a.name)) or _rounded(
            a, answer, i, problem, recompute_rest=recompute_rest, up=over <= 0
        )
        residency[a.name] = home
        over += a.bytes * (home.offloaded / a.tokens - float(answer.fractions[i, 1]))
    return residency


def _decision(
    problem: Problem, residency: Mapping[str, Residency], free: Answer, fixed: Answer, solver_seconds: float
) -> Decision:
    recompute = _recompute_seconds(problem, residency)
    amounts = {
        Binding.DEVICE_MEMORY: (problem.budget or 0) / 2**30,
        Binding.HOST_MEMORY: problem.host_budget / 2**30,
        Binding.OFFLOAD_RATE: problem.d2h / 1e9,
        Binding.PREFETCH_RATE: problem.h2d / 1e9,
    }
    worth = {key: price * amounts[key] for key, price in free.prices.items()}
    return Decision(
        residency=dict(residency),
        peak=int(fixed.peak),
        seconds=sum(problem.seconds) + recompute + fixed.stall,
        stall_seconds=fixed.stall,
        recompute_seconds=recompute,
        binding=max(worth, key=lambda key: worth[key]) if any(worth.values()) else Binding.NOTHING,
        prices=free.prices,
        solver_seconds=solver_seconds,
    )


_Rounding = tuple[dict[str, Residency], Answer, Answer]  # residency, the answer that it rounds, the answer for it


def _rounded(
    a: Activation, answer: Answer, index: int, problem: Problem, *, recompute_rest: bool, up: bool
) -> Residency:
    """Whole slices. What is kept and offloaded is rounded down, so that no row of memory breaks.

    The rest is recomputed, where it may be and with `recompute_rest` or where nothing is offloaded; else it is
    offloaded, or with `up` false kept.
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
    if sliced and (recompute_rest or r > 1e-6 or not a.can_offload or not offloaded):
        return Residency(kept, offloaded, rest)
    if a.can_offload and (up or not k > 1e-6):
        return Residency(kept, offloaded + rest, 0)
    return Residency(kept + rest, offloaded, 0)
