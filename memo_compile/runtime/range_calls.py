"""Calls of a graph for a range of lengths that wait for their backward: within a budget in bytes, or refused before.

A graph of one length is planned again where there are more of them than it was planned for. One plan for a range stays
as it is: another would be of the length at hand alone, beside calls of longer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memo_compile.errors import TooManyCalls
from memo_compile.registry import registry
from memo_compile.runtime.outstanding import ledger

Compiled = Callable[..., Any]


def within_budget(compiled: Compiled, graph: str, family: str, budget: int, device: torch.device) -> Compiled:
    """`compiled`, which refuses a call that would exceed a budget in bytes beside those that wait.

    All count as at the upper ends of their ranges.

    Raises:
        TooManyCalls: by a call beyond those that were planned for.
    """

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            _check(graph, family, budget, device)
        return compiled(*args)

    return run


def _check(graph: str, family: str, budget: int, device: torch.device) -> None:
    waiting, plan = ledger().of_family(family), registry().named(graph)
    if plan is None or waiting < plan.calls:
        return
    others, own = ledger().held(device, beside=graph, family=family), ledger().bytes_of(graph)
    alone = plan.predicted_peak - (plan.calls - 1) * max(own, default=0)
    needed = others + sum(own) + alone
    if needed > max(budget, plan.budget or 0):
        raise TooManyCalls(budget, waiting, needed)
