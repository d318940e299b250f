"""The closed loop: plan, look at what the plan really holds, and lower the target by more than the excess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from memo_compile.errors import BudgetTooSmall
from memo_compile.logs import logger
from memo_compile.planning.decide import Decided, decide
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import Limits
from memo_compile.planning.search import least_peak

log = logger(__name__)

ROUNDS = 2  # with the smallest plan as the third
OVERSHOOT = 2.5  # of the excess: a smaller plan misses by more than the one before, up to twice as much (HF GPT-2)
AIM = 0.985  # of a budget, at first, where a compiler fuses: plans miss by about a hundredth, and a round takes seconds
WORTHWHILE = (
    0.7  # of the unplanned peak by the model, up to 1.22 times the emitted graph's: plans below need no comparison
)
TRIFLE = 1e-3  # of a step's budget: a graph behind a graph break may be a few bytes
T = TypeVar("T")


@dataclass(frozen=True)
class Settled(Generic[T]):
    """A plan with what it was found to hold: `peak` bytes, and the evidence for it."""

    decided: Decided
    peak: int
    evidence: T
    rounds: int


def settle(
    p: Prepared, limits: Limits, evaluate: Callable[[Decided], tuple[int, T]], *, name: str, backend: str
) -> Settled[T]:
    """The fastest plan that `evaluate` finds within `limits.budget`.

    Args:
        evaluate: the bytes that the graphs of a plan hold at most, and what tells so.

    Where not even the smallest plan is within a budget that is not promised, that plan.

    Raises:
        BudgetTooSmall: not even the smallest plan is within the budget.
    """
    settled = _settled(p, limits, evaluate, name, backend)
    least = settled.peak if limits.objective == "memory" else min(settled.peak, least_peak(p, limits))
    plan = replace(settled.decided.plan, least_peak=least)
    return replace(settled, decided=replace(settled.decided, plan=plan))


def _settled(
    p: Prepared, limits: Limits, evaluate: Callable[[Decided], tuple[int, T]], name: str, backend: str
) -> Settled[T]:
    if limits.objective == "memory":
        return Settled(*_smallest(p, limits, evaluate, name, backend), rounds=1)
    target = limits.budget
    if p.fused and target is not None and target < p.unplanned_peak:
        target = int(AIM * target)
    rounds = 0
    for rounds in range(1, ROUNDS + 1):
        decided, peak, evidence = _looked_at(p, replace(limits, budget=target), evaluate, name, backend)
        if limits.budget is None or peak <= limits.budget:
            return Settled(decided, peak, evidence, rounds)
        log.debug("%s: the plan for %s bytes holds %s, over a budget of %s", name, target, peak, limits.budget)
        assert target is not None
        target = max(1, min(target, decided.plan.predicted_peak) - int(OVERSHOOT * (peak - limits.budget)))
    decided, peak, evidence = _smallest(p, limits, evaluate, name, backend)
    if limits.budget is not None and peak > limits.budget and limits.promised and not trifling(peak, limits):
        raise BudgetTooSmall(limits.budget, peak, decided.obstacles, limits.beside)
    return Settled(decided, peak, evidence, rounds + 1)


def trifling(peak: int, limits: Limits) -> bool:
    """Whether so few bytes do not matter to the step's budget, whoever holds the rest of it."""
    return limits.budget is not None and peak <= TRIFLE * (limits.budget + limits.beside)


def _smallest(
    p: Prepared, limits: Limits, evaluate: Callable[[Decided], tuple[int, T]], name: str, backend: str
) -> tuple[Decided, int, T]:
    """The plan that holds least: of a small graph that may be the unplanned one, which a compiler fuses further."""
    least = _looked_at(p, replace(limits, objective="memory"), evaluate, name, backend)
    if limits.offload == "all" or least[1] <= WORTHWHILE * p.unplanned_peak:
        return least
    unplanned = _looked_at(p, replace(limits, budget=None, objective="time", offload=False), evaluate, name, backend)
    if least[1] <= unplanned[1]:
        return least
    return replace(unplanned[0], obstacles=least[0].obstacles), *unplanned[1:]


def _looked_at(
    p: Prepared, limits: Limits, evaluate: Callable[[Decided], tuple[int, T]], name: str, backend: str
) -> tuple[Decided, int, T]:
    decided = decide(p, limits, name=name, backend=backend)
    return (decided, *evaluate(decided))
