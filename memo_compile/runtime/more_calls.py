"""A graph of which more calls wait for their backward than it was planned for: planned again for twice as many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memo_compile.logs import logger
from memo_compile.runtime.outstanding import ledger
from memo_compile.runtime.planning_again import as_dynamo_would

log = logger(__name__)

Compiled = Callable[..., Any]


def for_all_calls(compiled: Compiled, graph: str, calls: int, replan: Callable[[int, list[Any]], Compiled]) -> Compiled:
    """`compiled`, which was planned for `calls` at once, until there are more.

    What the calls of before hold stays theirs until their backward: the step that is under way may exceed a budget.

    Args:
        replan: plans and compiles for so many calls, for the arguments of one. Ranks that run one program come to it at
            the same call.
    """
    current, known = compiled, calls

    def too_many() -> bool:
        return torch.is_grad_enabled() and ledger().outstanding(graph) >= known

    def plan_again(args: list[Any]) -> None:
        nonlocal current, known
        more = 2 * ledger().outstanding(graph)
        log.warning(
            "%s: %d calls wait for their backward, and it was planned for %d; it is planned again for %d. "
            'options={"calls": ...} tells how many there will be, and spares that.',
            *(graph, more // 2 + 1, known, more),
        )
        current = replan(more, args)
        known = more

    def run(*args: Any) -> Any:
        if too_many():
            with as_dynamo_would():
                if too_many():  # unless another thread was first
                    plan_again(list(args))
        return current(*args)

    return run
