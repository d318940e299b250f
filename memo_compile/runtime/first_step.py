"""Measures what a graph holds in its first step, for the log, and holds it against the budget.

The forward and the backward are measured apart, so that what the training loop does between them does not count. On
CUDA it is the second step: in a first one kernels are tuned, and libraries take what stays theirs. Nothing is measured
where INFO is off and nobody asked for a budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memo_compile.logs import MIB, logger
from memo_compile.registry import registry
from memo_compile.schema import Plan
from memo_compile.workspaces.recording import Key, Record, can_record, recorded

EXCESS = 1.01  # of the budget: beyond that the measurement contradicts the plan
BESIDE = 16 * 1024  # bytes: scalars, and what autograd itself holds, of which no plan knows

log = logger("memo_compile")


@dataclass(frozen=True)
class Overrun:
    """A step held `held` bytes where the budget allows `budget`. `taken` is what ops took for themselves, at most."""

    budget: int
    held: int
    taken: Mapping[Key, int]


class FirstStep:
    """Wraps a graph's forward and backward; says what they held once each has run.

    `overrun` then tells whether that was more than the budget allows.
    """

    def __init__(self, name: str, device: str = "cpu", *, asks: bool = False) -> None:
        self.overrun: Overrun | None = None
        self.name, self._device, self._asks = name, device, asks
        self._waiting = asks or log.isEnabledFor(logging.INFO)
        self._to_skip = 1 if device == "cuda" else 0
        self._forward: Record | None = None

    def another(self) -> FirstStep:
        """For another compilation of the same graph."""
        return FirstStep(self.name, self._device, asks=self._asks)

    def forward(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, measured in its first call."""
        if not self._waiting:
            return fn

        def run(*args: Any) -> Any:
            if not self._waiting or not can_record():
                return fn(*args)
            if self._to_skip:
                self._to_skip -= 1
                return fn(*args)
            if self._forward is not None:  # a second forward before any backward: no sum of the two is the step's
                self._waiting = False
                return fn(*args)
            result, self._forward = recorded(fn, *args, device=self._device)
            return result

        return run

    def backward(self, fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """`fn`, a boxed call, measured in its first call."""
        if not self._waiting:
            return fn

        def run(args: list[Any]) -> Any:
            before, self._forward = self._forward, None
            if not self._waiting or before is None or not can_record():
                return fn(args)
            self._waiting = False
            result, after = recorded(fn, args, device=self._device)
            self.overrun = _judged(self.name, before, after)
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _judged(name: str, forward: Record, backward: Record) -> Overrun | None:
    """Say what a step held; returns by how much that contradicts the plan, if it does."""
    peak = max(forward.peak, forward.held + backward.peak)
    plan = registry().named(name)
    if plan is None or not peak:
        return None
    # One call's figures say little of a plan for several.
    log.log(
        logging.INFO if plan.calls == 1 else logging.DEBUG,
        "%s (%s): peak %.1f MiB measured in the first step, %+.1f %% of what was planned",
        *(plan.name, plan.backend, peak / MIB, 100 * (peak / plan.predicted_peak - 1)),
    )
    if plan.budget is None or not is_over(plan, peak):
        return None
    taken = dict(forward.taken)
    for key, size in backward.taken.items():
        taken[key] = max(size, taken.get(key, 0))
    return Overrun(plan.budget, peak, taken)


def is_over(plan: Plan, held: int) -> bool:
    """Whether a plan that is to keep its budget held more."""
    if plan.budget is None or plan.predicted_peak > plan.budget:
        return False
    return held > max(EXCESS * plan.budget, plan.budget + BESIDE)
