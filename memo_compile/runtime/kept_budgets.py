"""A budget that the first step exceeds: planned again once with what was seen, or refused with the op that took it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memo_compile.errors import BudgetExceeded, BudgetTooSmall
from memo_compile.logs import MIB, logger
from memo_compile.registry import registry
from memo_compile.runtime.first_step import FirstStep, Overrun
from memo_compile.runtime.planning_again import as_dynamo_would
from memo_compile.workspaces.seen import seen

log = logger(__name__)

Compiled = Callable[..., Any]


def kept(compiled: Compiled, step: FirstStep, recompile: Callable[[FirstStep, list[Any]], Compiled]) -> Compiled:
    """`compiled`, until its first step is seen to exceed its budget.

    Args:
        recompile: plans and compiles once more, for the arguments of a call; the next call is the first that runs it.
            It is not called where ranks run beside this one, which would have another plan.

    Raises:
        BudgetExceeded: by the call after the step that held too much, where another plan cannot mend it.
    """
    current, latest, planned_again = compiled, step, False

    def judge(overrun: Overrun, args: list[Any]) -> None:
        nonlocal current, latest, planned_again
        if not _is_news(latest.name, overrun):
            # What else runs within the step (hooks, other graphs, other threads) counts too: no reason to end training.
            log.warning(
                "%s: a step held %.1f MiB, over its budget of %.1f MiB, and no op is seen to have taken it",
                *(latest.name, overrun.held / MIB, overrun.budget / MIB),
            )
            return
        if planned_again or _ranks() > 1:
            raise _refusal(latest.name, overrun)
        log.warning(
            "%s: the first step held %.1f MiB, over its budget of %.1f MiB; it is planned again with what was seen",
            *(latest.name, overrun.held / MIB, overrun.budget / MIB),
        )
        seen().add(overrun.taken)
        planned_again = True
        latest = latest.another()
        try:
            current = recompile(latest, args)
        except BudgetTooSmall as error:
            raise _refusal(latest.name, overrun) from error

    def run(*args: Any) -> Any:
        if latest.has_overrun:
            with as_dynamo_would():
                overrun = latest.take_overrun()
                if overrun is not None:  # else another thread was first
                    judge(overrun, list(args))
        return current(*args)

    return run


def _ranks() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return int(torch.distributed.get_world_size()) if distributed else 1


def _is_news(name: str, overrun: Overrun) -> bool:
    """Whether an op took more than the plan knew of."""
    return any(excess > 0 for _, excess in _beyond(name, overrun))


def _beyond(name: str, overrun: Overrun) -> list[tuple[str, int]]:
    """For each op that took anything, by how much that was more than the plan has for it."""
    plan = registry().named(name)
    planned: dict[str, int] = {}
    for workspace in plan.workspaces if plan is not None else ():
        op = workspace.op.rpartition(".")[0].replace(".", "::")
        planned[op] = max(workspace.bytes, planned.get(op, 0))
    return [(op, size - planned.get(op, 0)) for (op, _), size in overrun.taken.items()]


def _refusal(name: str, overrun: Overrun) -> BudgetExceeded:
    op, _ = max(_beyond(name, overrun), key=lambda found: found[1], default=("", 0))
    size = max((size for (other, _), size in overrun.taken.items() if other == op), default=0)
    return BudgetExceeded(overrun.budget, overrun.held, op, size)
