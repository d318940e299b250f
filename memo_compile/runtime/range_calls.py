"""Calls of a graph for a range of lengths that wait for their backward: within budgets in bytes, or refused before.

A graph of one length is planned again where there are more of them than it was planned for. One plan for a range stays
as it is: another would be of the length at hand alone, beside calls of longer ones. Where a budget is no promise in
bytes, it is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memo_compile.errors import TooManyCalls
from memo_compile.logs import logger
from memo_compile.registry import registry
from memo_compile.runtime.outstanding import ledger
from memo_compile.schema import Plan

log = logger("memo_compile")

Compiled = Callable[..., Any]


def within_budgets(
    compiled: Compiled, graph: str, family: str, device: torch.device, *, budget: float | str, host: int | str
) -> Compiled:
    """`compiled`, which refuses a call that would exceed a budget in bytes beside those that wait.

    All count as at the upper ends of their ranges.

    Args:
        budget, host: the user's `memory_budget` and `host_budget`.

    Raises:
        TooManyCalls: by a call beyond those that were planned for.
    """
    told = False

    def check(waiting: int, plan: Plan) -> None:
        nonlocal told
        if isinstance(budget, int):
            _check_device(plan, waiting, family, budget, device)
        elif not told and (plan.offloaded_bytes or plan.recomputed_bytes):
            told = True
            _say(plan, waiting, budget)
        if isinstance(host, int):
            _check_host(plan, waiting, family, host)

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            waiting, plan = ledger().of_family(family), registry().named(graph)
            if plan is not None and waiting >= plan.calls:
                check(waiting, plan)
        return compiled(*args)

    return run


def _check_device(plan: Plan, waiting: int, family: str, budget: int, device: torch.device) -> None:
    others, own = ledger().held(device, beside=plan.name, family=family), ledger().bytes_of(plan.name)
    alone = plan.predicted_peak - (plan.calls - 1) * max(own, default=0)
    needed = others + sum(own) + alone
    if needed > max(budget, plan.budget or 0):
        raise TooManyCalls(budget, waiting, needed)


def _check_host(plan: Plan, waiting: int, family: str, budget: int) -> None:
    own = len(ledger().bytes_of(plan.name))
    needed = ledger().on_host(beside=plan.name, family=family) + (own + 1) * plan.host_bytes
    if plan.host_bytes and needed > budget:
        raise TooManyCalls(budget, waiting, needed, "host_budget")


def _say(plan: Plan, waiting: int, budget: float | str) -> None:
    log.warning(
        "%s: %d calls wait for their backward, and one more begins. This plan for a range of lengths (%s) was made for "
        'memory_budget=%r and %d at once; each beyond that holds more. options={"calls": %d} plans for as many.',
        *(plan.name, waiting, plan.range, budget, plan.calls, waiting + 1),
    )
