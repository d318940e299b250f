"""A budget that is for all that torch's allocator reserves: a plan's target is lowered by what its heap wastes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from memo_compile.errors import BudgetTooSmall
from memo_compile.logs import logger
from memo_compile.planning.fit_budget import Fitted
from memo_compile.planning.problem import Limits

log = logger("memo_compile")

GIB = 2**30
AIM = 0.98  # of the budget, from then on: a smaller plan may waste more
ROUNDS = 2  # after the first: each takes dry runs
T = TypeVar("T")


def fit_reserved(
    fit: Callable[[Limits], Fitted[T]], limits: Limits, reserved: Callable[[T], int]
) -> tuple[Fitted[T], int]:
    """The fastest plan found for which no more is reserved than `limits.budget`, and what is.

    Args:
        fit: the fastest plan that allocates no more than the limits allow (`planning.fit_budget.fit_budget`).
        reserved: bytes that the allocator takes of the device for a plan, by its evidence.

    Where none is found, the plan for which least is reserved, with a warning: the allocator gives back what it does not
    use and goes on, which takes time.

    Raises:
        BudgetTooSmall: not even the smallest plan allocates so little.
    """
    fitted = fit(limits)
    if limits.budget is None:
        return fitted, reserved(fitted.evidence)
    found = [(reserved(fitted.evidence), fitted)]
    target = limits.budget
    for _ in range(ROUNDS):
        taken, latest = found[-1]
        if taken <= limits.budget or latest.peak > limits.budget:
            break
        lower = max(latest.decided.plan.least_peak, int(AIM * min(target, latest.peak) * limits.budget / taken))
        if lower >= target:
            break
        target = lower
        try:
            found.append(_again(fit, replace(limits, budget=target), reserved))
        except BudgetTooSmall:
            break
    rounds = sum(f.rounds for _, f in found)
    taken, best = next(((t, f) for t, f in found if t <= limits.budget), min(found, key=lambda one: one[0]))
    if taken > limits.budget:
        log.warning(
            "%s: torch's allocator may reserve %.2f GiB for the %.2f GiB of this plan, of %.2f GiB that are left, and "
            "steps wait whenever it has to give some back. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True wastes "
            "less; so does a lower memory_budget",
            *(best.decided.plan.name, taken / GIB, best.peak / GIB, limits.budget / GIB),
        )
    return replace(best, rounds=rounds), taken


def _again(fit: Callable[[Limits], Fitted[T]], limits: Limits, reserved: Callable[[T], int]) -> tuple[int, Fitted[T]]:
    fitted = fit(limits)
    return reserved(fitted.evidence), fitted
