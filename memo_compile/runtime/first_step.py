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


@dataclass(frozen=True)
class _Waiting:
    """The forward has not been measured; `to_skip` calls go before the one that is."""

    to_skip: int


@dataclass(frozen=True)
class _ForwardMeasured:
    """The backward is to come."""

    forward: Record


@dataclass(frozen=True)
class _Done:
    """Nothing more is measured; `overrun` where the step held more than the budget allows."""

    overrun: Overrun | None = None


class FirstStep:
    """Wraps a graph's forward and backward; says what they held once each has run.

    Its one moving part is the phase, which goes from waiting over the forward's figures to done.
    """

    def __init__(self, name: str, device: str = "cpu", *, asks: bool = False) -> None:
        self.name, self._device, self._asks = name, device, asks
        wanted = asks or log.isEnabledFor(logging.INFO)
        self._phase: _Waiting | _ForwardMeasured | _Done = _Waiting(1 if device == "cuda" else 0) if wanted else _Done()

    def another(self) -> FirstStep:
        """For another compilation of the same graph."""
        return FirstStep(self.name, self._device, asks=self._asks)

    @property
    def has_overrun(self) -> bool:
        """Whether the step held more than the budget allows, and nobody has taken note of it."""
        return isinstance(self._phase, _Done) and self._phase.overrun is not None

    def take_overrun(self) -> Overrun | None:
        """By how much the step held more than the budget allows, told once; None where it did not."""
        phase = self._phase
        if not isinstance(phase, _Done):
            return None
        self._phase = _Done()
        return phase.overrun

    def forward(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, measured in its first call."""
        if isinstance(self._phase, _Done):
            return fn

        def run(*args: Any) -> Any:
            phase = self._phase
            if isinstance(phase, _Done) or not can_record():
                return fn(*args)
            if isinstance(phase, _ForwardMeasured):  # a second forward: no sum of the two is the step's
                self._phase = _Done()
                return fn(*args)
            if phase.to_skip:
                self._phase = _Waiting(phase.to_skip - 1)
                return fn(*args)
            result, record = recorded(fn, *args, device=self._device)
            self._phase = _ForwardMeasured(record)
            return result

        return run

    def backward(self, fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """`fn`, a boxed call, measured in its first call."""
        if isinstance(self._phase, _Done):
            return fn

        def run(args: list[Any]) -> Any:
            phase = self._phase
            if not isinstance(phase, _ForwardMeasured):
                return fn(args)
            if not can_record():
                self._phase = _Waiting(0)
                return fn(args)
            self._phase = _Done()
            result, after = recorded(fn, args, device=self._device)
            self._phase = _Done(_judged(self.name, phase.forward, after))
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
