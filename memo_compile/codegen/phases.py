"""The phases of a compilation: each is frozen, and holds what the next one needs and what all before it held.

Inductor calls back, so that one phase cannot hand the next on as an argument: a `Course` holds the present one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from memo_compile.codegen.arena.layout import ArenaLayout, Link
from memo_compile.codegen.arena.sides import buffers_of
from memo_compile.codegen.caching.plans import KeptPlan
from memo_compile.codegen.emitted.prefetch_buffers import how_many_early, schedule_of
from memo_compile.codegen.emitted.verifier import EmittedRegions
from memo_compile.codegen.rehearsal import Evidence, Rehearsal
from memo_compile.planning.decide import Decided
from memo_compile.planning.prepared import Prepared
from memo_compile.runtime.cross_call import Schedule
from memo_compile.schema import Plan, Side
from memo_compile.trace.observer import Observer
from memo_compile.trace.setting import Told


@dataclass(frozen=True)
class Begun:
    """Nothing is known yet; it stays so for a graph that needs no gradient."""


@dataclass(frozen=True)
class Planned:
    """The joint graph was planned. `evidence` is of dry runs, until there is better; `to_keep` may serve again."""

    prepared: Prepared
    decided: Decided
    plan: Plan
    rehearsal: Rehearsal
    evidence: Evidence
    links: tuple[Link, ...]
    observer: Observer
    told: Told
    to_keep: KeptPlan | None = None


@dataclass(frozen=True, kw_only=True)
class ForwardEmitted(Planned):
    """The forward's text was read and verified; `evidence.forward` is of it."""

    regions: EmittedRegions


@dataclass(frozen=True, kw_only=True)
class BackwardEmitted(ForwardEmitted):
    """The backward's text, too; `schedule` is what a call before it may start for it."""

    schedule: Schedule


Phase = Begun | Planned
P = TypeVar("P", Begun, Planned, ForwardEmitted, BackwardEmitted)


class Course:
    """Where a compilation is: the one thing of it that changes, and by `advance` alone."""

    def __init__(self) -> None:
        self.phase: Phase = Begun()

    def at(self, kind: type[P]) -> P:
        """The present phase, of the kind that the order of Inductor's calls makes it.

        Raises:
            RuntimeError: Inductor called in another order.
        """
        if not isinstance(self.phase, kind):
            raise RuntimeError(f"Inductor called at {type(self.phase).__name__} what is due at {kind.__name__}")
        return self.phase

    def advance(self, phase: Planned) -> None:
        """Go on to the next phase, or to the same one with better evidence."""
        self.phase = phase


def next_phase(phase: Planned, to: type[Any], **more: Any) -> Any:
    """A later phase, with what this one holds."""
    return to(**({f.name: getattr(phase, f.name) for f in fields(phase)} | more))


def early_schedule(rehearsal: Rehearsal, layout: ArenaLayout, lines: Sequence[str]) -> Schedule:
    """What calls before a backward may start for it: never more than one arena beside their own."""
    schedule, budget = schedule_of(lines), rehearsal.budget
    if rehearsal.ranged:  # places are of the size of this call's length, which the call before does not know
        return replace(schedule, early=())
    starts = {b.name: b.start for b in buffers_of(Side.BACKWARD, layout.buffers)}
    sizes = [(starts[prefetch.buffer], prefetch.nbytes) for prefetch in schedule.early]
    early = how_many_early(sizes, layout.held, layout.forward_steps, layout.arena_bytes)
    if budget is not None:
        while early and layout.peak + sum(size for _, size in sizes[:early]) > budget:
            early -= 1
    poison = rehearsal.setting.options.verify == "poison"
    return replace(schedule, early=schedule.early[:early], poison=poison)


def placed_plan(planned: Planned) -> Plan:
    """The plan with what the layout says, shown to the observer."""
    evidence, decided = planned.evidence, planned.decided
    layout, seconds = evidence.layout, evidence.seconds
    smallest = planned.rehearsal.setting.options.memory_budget == "min"
    plan = replace(
        planned.plan,
        predicted_peak=layout.peak,
        predicted_seconds=planned.plan.predicted_seconds if seconds is None else seconds,
        least_peak=layout.peak if smallest else min(planned.plan.least_peak, layout.peak),
        unplanned_peak=planned.plan.unplanned_peak if decided.residency else layout.peak,
        arena_bytes=layout.arena_bytes,
        lower_bound=layout.lower_bound,
        coverage=layout.coverage,
        segments=layout.segments,
        buffers=layout.buffers,
        predicted_reserved=layout.reserved(planned.rehearsal.setting.allocator),
    )
    observer = planned.observer
    observer.plan(plan)
    emitted = planned.rehearsal.arena_arguments(decided, evidence.forward, evidence.backward)
    observer.emitted(emitted)
    observer.report(planned.prepared, decided, plan, emitted)
    return plan
