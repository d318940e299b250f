"""A graph of which more calls wait for their backward than it was planned for: planned again for twice as many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memo_compile.logs import logger
from memo_compile.runtime.outstanding import ledger

log = logger(__name__)

Compiled = Callable[..., Any]


def for_all_calls(compiled: Compiled, graph: str, calls: int, again: Callable[[int, list[Any]], Compiled]) -> Compiled:
    """`compiled`, which was planned for `calls` at once, until there are more.

    What the calls of before hold stays theirs until their backward: the step that is under way may exceed a budget.

    Args:
        again: plans and compiles for so many calls, for the arguments of one. Ranks that run one program come to it at
            the same call.
    """
    current, known = compiled, calls

    def run(*args: Any) -> Any:
        nonlocal current, known
        waiting = ledger().outstanding(graph) if torch.is_grad_enabled() else 0
        if waiting >= known:
            known = 2 * waiting
            log.warning(
                "%s: %d calls wait for their backward, and it was planned for %d; it is planned again for %d. "
                'options={"calls": ...} tells how many there will be, and spares that.',
                *(graph, waiting + 1, known // 2, known),
            )
            current = again(known, list(args))
        return current(*args)

    return run
