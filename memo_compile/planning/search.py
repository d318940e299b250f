"""The best answer over all sets of anchors, and the least that can be held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache

from memo_compile.errors import SolverOutOfTime
from memo_compile.logs import logger
from memo_compile.planning import residency, rounding
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import Limits, View, problems_of, view_of

log = logger(__name__)

WORTH = 0.02  # of a peak: what is gained at least where values come from the host more than once
CLOSE = 3e-4  # of the step: how near to the bound an answer ends the search for a better set of anchors


PATIENCE = 2  # sets of anchors for which the solver may run out of time before any has an answer


def least_peak(p: Prepared, limits: Limits, free: frozenset[str] = frozenset()) -> int:
    """The least bytes that the program knows how to hold, as if the values in `free`, by name, took none.

    The arena is known only of plans that are made.
    """
    if not p.plannable:
        return p.unplanned_peak
    found = [p.unplanned_peak]
    for problem in problems_of(view_of(p, limits, free)):
        with suppress(SolverOutOfTime):
            found += [int(rounding.smallest_peak(way, time_limit=limits.time_limit)) for way in _ways(problem)]
    return min(found)


def best_of(view: View, limits: Limits, *, again: bool = True) -> tuple[residency.Problem, residency.Decision, bool]:
    """The best answer over all sets of anchors, and whether it keeps the budget.

    Args:
        again: whether the smallest may be one in which values come from the host more than once.

    Raises:
        SolverOutOfTime: no answer for any set within `limits.time_limit` seconds for each program.
    """
    once = problems_of(view)
    unpulled = replace(view.problem, activations=tuple(view.activations.values())) if len(once) > 1 else None

    @cache
    def peak(problem: residency.Problem) -> float:
        return rounding.smallest_peak(problem, time_limit=limits.time_limit)

    def fastest(
        problems: Sequence[residency.Problem], budget: int | None, unpulled: residency.Problem | None = unpulled
    ) -> tuple[residency.Problem, residency.Decision] | None:
        # Whether anything fits is asked first, and only when it comes to it: it is told much sooner than what is best.
        roomy = (replace(p, budget=budget) for p in problems if budget is None or peak(p) <= budget)
        return _fastest(replace(unpulled, budget=budget) if unpulled else None, roomy, limits.time_limit)

    if limits.objective == "time":
        found = fastest(once, view.problem.budget)
        if found is not None:
            return (*found, True)
    twice = [way for problem in once if again for way in _ways(problem)[1:]]
    smallest = min((*once, *twice), key=lambda p: peak(p) / (1.0 if p.again else 1 + WORTH))
    try:
        problems, bound = (twice, None) if smallest.again else (once, unpulled)
        found = fastest(problems, int(rounding.slightly_more(peak(smallest))), bound)
    except SolverOutOfTime as late:
        log.warning("the smallest plan is not the fastest of such: %s", late)
        found = None
    if found is None:  # or slices are too coarse for so little room
        found = smallest, rounding.least(smallest, time_limit=limits.time_limit)
    problem, decision = replace(found[0], budget=limits.budget), found[1]
    return problem, decision, limits.budget is None or decision.peak <= limits.budget


def _ways(problem: residency.Problem) -> list[residency.Problem]:
    """The problem, and that in which what is offloaded comes more than once, where something may and the host has room.

    Then all of that is offloaded: other rows of it would have to stay, or be made again.
    """
    comes = {a.name for a in problem.activations if a.unread and a.can_offload}
    if not comes or sum(a.bytes for a in problem.activations if a.name in comes) > problem.host_budget:
        return [problem]
    activations = (
        replace(a, recompute_seconds=None, can_stay=False) if a.name in comes else a for a in problem.activations
    )
    return [problem, replace(problem, activations=tuple(activations), again=True)]


def _fastest(
    unpulled: residency.Problem | None, problems: Iterable[residency.Problem], time_limit: float
) -> tuple[residency.Problem, residency.Decision] | None:
    """The fastest answer; None where no problem has one.

    The search ends early where a set's answer is as good as if recomputation pulled nothing forward (`unpulled`): no
    set beats that.
    """
    bound: residency.Decision | SolverOutOfTime | None = None
    fitting: list[tuple[residency.Problem, residency.Decision]] = []
    late: list[SolverOutOfTime] = []
    for problem in problems:
        if bound is None and unpulled is not None:
            bound = _in_time(unpulled, time_limit)
        found = _in_time(problem, time_limit)
        if isinstance(found, SolverOutOfTime):
            late.append(found)
            if len(late) == PATIENCE and not fitting:
                break
        elif found is not None:
            fitting.append((problem, found))
            if isinstance(bound, residency.Decision) and found.seconds <= bound.seconds * (1 + CLOSE):
                break
    if late:
        if not fitting:
            raise late[0]
        log.warning("the solver ran out of time for some sets of anchors: a faster plan may exist (%s)", late[0])
    return min(fitting, key=lambda answer: answer[1].seconds, default=None)


def _in_time(problem: residency.Problem, time_limit: float) -> residency.Decision | SolverOutOfTime | None:
    try:
        return rounding.decide(problem, time_limit=time_limit)
    except SolverOutOfTime as late:
        return late
