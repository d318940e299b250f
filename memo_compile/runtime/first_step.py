"""Measures what a graph holds in its first step, for the log: it costs nothing later, and nothing where INFO is off.

The forward and the backward are measured apart, so that what the training loop does between them does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from memo_compile.logs import MIB, logger
from memo_compile.registry import registry
from memo_compile.runtime.memory_usage import Usage, usage

EXCESS = 1.01  # of the budget: beyond that the measurement contradicts the plan

log = logger("memo_compile")


class FirstStep:
    """Wraps a graph's forward and backward; says what they held once each has run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting = log.isEnabledFor(logging.INFO)
        self._forward: Usage | None = None

    def forward(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, measured in its first call."""
        if not self._waiting:
            return fn

        def run(*args: Any) -> Any:
            if not self._waiting:
                return fn(*args)
            if self._forward is not None:  # a second forward before any backward: no sum of the two is the step's
                self._waiting = False
                return fn(*args)
            result, self._forward = usage(fn, *args)
            return result

        return run

    def backward(self, fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """`fn`, a boxed call, measured in its first call."""
        if not self._waiting:
            return fn

        def run(args: list[Any]) -> Any:
            before, self._forward = self._forward, None
            if not self._waiting or before is None:
                return fn(args)
            self._waiting = False
            result, after = usage(fn, args)
            _say(self._name, before, after)
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _say(name: str, forward: Usage | None, backward: Usage | None) -> None:
    if forward is None or backward is None:
        return
    peak = max(forward.peak, forward.held + backward.peak)
    plan = registry().named(name)
    if plan is None or not peak:
        return
    log.info(
        "%s (%s): peak %.1f MiB measured in the first step, %+.1f %% of what was planned",
        *(plan.name, plan.backend, peak / MIB, 100 * (peak / plan.predicted_peak - 1)),
    )
    promised = plan.budget is not None and plan.predicted_peak <= plan.budget
    if plan.budget is not None and promised and peak > EXCESS * plan.budget:
        log.warning(
            "%s: the first step held %.1f MiB, over its budget of %.1f MiB. Please report this with a dump (dump=...).",
            *(plan.name, peak / MIB, plan.budget / MIB),
        )
