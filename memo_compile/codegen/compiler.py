"""`memo`: plan a graph within Inductor's compilation, and emit it with the arena.

Inductor hands the joint graph to `_Compilation.partition`, which plans and looks at dry runs of what it decided, and
then both graphs to `_Compilation.inner`, which compiles them with buffers at the offsets of one layout. What is known
by then is the phase of the compilation's course.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `compile_fx`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch.fx as fx

from memo_compile.codegen.arena.layout import ArenaLayout, handed_on, plan_arena
from memo_compile.codegen.arena.sides import buffers_of
from memo_compile.codegen.caching.key import key_for
from memo_compile.codegen.caching.plan_key import keeps_plans, plan_key
from memo_compile.codegen.caching.plans import keep
from memo_compile.codegen.caching.tiles import tiles_of
from memo_compile.codegen.corrections import corrected
from memo_compile.codegen.donation import donating, nothing_donated
from memo_compile.codegen.emitted.body import Body
from memo_compile.codegen.emitted.direct import direct
from memo_compile.codegen.emitted.poison import IMPORT, kept_for_backward, poisoned
from memo_compile.codegen.emitted.verifier import read_regions, verify_emitted
from memo_compile.codegen.fitting import fit_or_find
from memo_compile.codegen.inductor import collection_paused, num_outputs, settings_for, through_inductor
from memo_compile.codegen.kernels import kernels_beside
from memo_compile.codegen.phases import (
    BackwardEmitted,
    Course,
    ForwardEmitted,
    Planned,
    early_schedule,
    next_phase,
    placed_plan,
)
from memo_compile.codegen.rehearsal import Evidence, Rehearsal, donatable, gone_on_with, links_of
from memo_compile.codegen.scheduler.arrivals import check_arrivals
from memo_compile.codegen.scheduler.dependencies import knows_all
from memo_compile.codegen.scheduler.order import (
    check_order,
    check_prefetched_reads,
    emitted_steps,
    planned_steps,
)
from memo_compile.codegen.tile_bodies import compile_bodies
from memo_compile.codegen.wrapper import Hooks, arena_wrapper
from memo_compile.errors import BudgetTooSmall
from memo_compile.logs import logger
from memo_compile.options import Options
from memo_compile.passes.fx.facts import check_sizes
from memo_compile.passes.fx.meta import LAYER
from memo_compile.passes.fx.ranges import NoRange, NothingPlanned, has_symbols, write_numbers
from memo_compile.passes.transforms.partition import split_as_torch
from memo_compile.planning.decide import Decided, lease_input, lease_output
from memo_compile.planning.prepared import Prepared, of_calls, prepare
from memo_compile.planning.ranges import for_a_range, in_symbols, over_range
from memo_compile.planning.tiling import with_tiles
from memo_compile.progress import Progress
from memo_compile.runtime.cross_call import Schedule
from memo_compile.schema import ArenaBuffer, ArenaSegment, Plan, Side
from memo_compile.trace.captured import takes_gradients
from memo_compile.trace.observer import Observe, Observer, nobody
from memo_compile.trace.sequence import part_of, share_sequence
from memo_compile.trace.setting import (
    Setting,
    check_one_plan,
    check_planned,
    record,
    setting_for,
    tell_of_results,
    told_of,
    with_budget_now,
)

log = logger(__name__)


def compile_planned(gm: fx.GraphModule, inputs: Sequence[Any], setting: Setting) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor, planned and placed."""
    with Progress(setting.name) as progress:
        waited = partial(progress.step, "compiling kernels")
        with collection_paused(), kernels_beside(waited), corrected():
            return _compiled(gm, inputs, replace(setting, progress=progress))


def _compiled(gm: fx.GraphModule, inputs: Sequence[Any], setting: Setting) -> Callable[..., Any]:
    from memo_compile.codegen.caching.calls import Found  # loads Inductor

    setting = with_budget_now(setting)
    key, found = key_for(setting, gm, inputs), Found(setting)
    through = partial(through_inductor, key=key, loaded=found.loaded)
    inside = takes_gradients(gm)
    run = _Compilation(setting, num_outputs(gm), gradients_inside=inside, key=key, keeps=keeps_plans(setting))
    try:
        compiled: Any = through(run.partition, run.inner, gm, inputs, setting.options)
    except _Exceeded as exceeded:
        log.info("%s: what was emitted is not what dry runs showed; planned again from closer ones", setting.name)
        rounds = exceeded.planned.plan.rounds
        run = replace(run, scalar=False, rounds=rounds, course=Course())
        compiled = through(run.partition, run.inner, gm, inputs, setting.options)
    found.tell()
    if isinstance(run.course.phase, Planned):
        if run.course.phase.to_keep is not None:
            keep(run.course.phase.to_keep)
        compiled = run.course.phase.observer.measured("forward", compiled, setting.device)
    return setting.first_step.forward(compiled)


@dataclass(frozen=True)
class Looked:
    """A graph that was planned and placed, and not compiled."""

    plan: Plan
    prepared: Prepared
    decided: Decided
    layout: ArenaLayout


class _Stopped(BaseException):
    """Ends a compilation once the plan is made. Not an `Exception`: nothing wraps it."""


class _Exceeded(BaseException):
    """Ends a compilation whose emitted code is not what a dry run promised. Not an `Exception`: nothing wraps it."""

    def __init__(self, planned: Planned) -> None:
        super().__init__()
        self.planned = planned


def look(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, observe: Observe = nobody) -> Looked | None:
    """Plan a Dynamo graph as `compile_planned` does, from dry runs, and stop; None where it needs no gradient."""
    setting = setting_for(options, inputs, observe)
    run = _Compilation(setting, num_outputs(gm), compiles=False)

    def stop(*_: Any, **__: Any) -> Any:
        raise _Stopped

    with contextlib.suppress(_Stopped), collection_paused(), corrected():
        through_inductor(run.partition, stop, gm, inputs, options)
    planned = run.course.phase
    if not isinstance(planned, Planned):
        return None
    return Looked(placed_plan(planned), planned.prepared, planned.decided, planned.evidence.layout)


@dataclass(frozen=True)
class _Asked:
    """What Inductor hands over with a joint graph, and who looks on while it is planned."""

    inputs: Any
    num_forward_outputs: int
    static: list[int] | None
    observer: Observer


@dataclass(frozen=True)
class _Compilation:
    """One graph's way through Inductor. Inductor calls `partition`, then `inner` for the forward and the backward."""

    setting: Setting
    num_user_outputs: int
    gradients_inside: bool = False
    scalar: bool = True
    rounds: int = 0  # before
    key: str | None = None
    keeps: bool = False
    compiles: bool = True
    course: Course = field(default_factory=Course)

    def partition(
        self, joint: fx.GraphModule, inputs: Any, num_forward_outputs: int, static: list[int] | None
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Plan the joint graph; returns its forward and backward."""
        check_sizes(joint)
        share_sequence(joint, static, part_of(self.setting.options))
        observer = self.setting.observe(self.setting.options.dump, self.setting.name)
        asked = _Asked(inputs, num_forward_outputs, static, observer)
        if has_symbols(joint):
            planned = self._over_range(joint, asked)
        else:
            write_numbers(joint)
            planned = self._planned(joint, asked)
        self.course.advance(planned)
        return planned.decided.forward, planned.decided.backward

    def _planned(self, joint: fx.GraphModule, asked: _Asked, *, least_rows: int = 0) -> Planned:
        """Plan a joint graph in numbers. A slice has `least_rows` at least, where the user has not said how many."""
        started, setting, observer = time.perf_counter(), self.setting, asked.observer
        num_forward_outputs, static = asked.num_forward_outputs, asked.static
        observer.joint(joint, num_forward_outputs, static)
        p = prepare(joint, asked.inputs, num_forward_outputs, static, setting.profile, fused=True, watch=observer.watch)
        p = of_calls(p, setting.calls)
        rehearsal = Rehearsal(
            setting=setting,
            num_user_outputs=self.num_user_outputs,
            num_forward_outputs=num_forward_outputs,
            static=tuple(static or ()),
            layers={n.name: n.meta[LAYER].index for n in joint.graph.nodes if LAYER in n.meta},
            scalar=self.scalar,
            calls=setting.calls,
            goes_on=self.compiles,
        )
        numbers = (num_forward_outputs, static, self.num_user_outputs, least_rows)
        key = plan_key(setting, p, *numbers) if self.keeps else None
        found = fit_or_find(p, rehearsal, partial(for_a_range, p, least=least_rows), observer.watch, key)
        p, rehearsal, limits, fitted = found.prepared, found.rehearsal, found.limits, found.fitted
        told = told_of(limits, fitted.decided, fitted.peak)
        check_planned(setting, told)
        tell_of_results(setting, fitted.decided.forward, num_forward_outputs, fitted.peak)
        if limits.budget is not None and fitted.peak > limits.budget:
            rehearsal = replace(rehearsal, budget=None)  # the least that there is was taken
        decided = fitted.decided
        p = with_tiles(p, decided.limits or limits)
        plan = replace(
            decided.plan,
            budget=limits.given(fitted.peak),
            rounds=self.rounds + fitted.rounds,
            seconds=time.perf_counter() - started,
        )
        links = links_of(decided, num_forward_outputs)
        observer.decided(p, decided, setting.options)
        return Planned(
            prepared=p,
            decided=decided,
            plan=plan,
            rehearsal=rehearsal,
            evidence=fitted.evidence,
            links=links,
            observer=observer,
            told=told,
            to_keep=found.to_keep,
        )

    def _over_range(self, joint: fx.GraphModule, asked: _Asked) -> Planned:
        """Plan at the upper end, and carry it out in symbols; the emitted text is read at the upper end, too."""
        check_one_plan(joint, self.setting)
        unplanned = split_as_torch(joint, asked.inputs, asked.num_forward_outputs, asked.static)

        def plan(graph: fx.GraphModule, rows: int) -> Planned:
            return self._planned(graph, asked, least_rows=rows)

        planned, ends = over_range(joint, self.setting.options.lengths, plan)
        emitted = in_symbols(joint, unplanned, planned.prepared, planned.decided, ends, self.setting.host)
        planned = replace(planned, plan=replace(planned.plan, range=emitted.plan.range))
        if not planned.decided.residency:
            record(placed_plan(planned))
            raise NothingPlanned
        rehearsal = replace(planned.rehearsal, ranged=True)
        evidence = rehearsal.dry(emitted)
        if rehearsal.budget is not None and evidence.layout.peak > rehearsal.budget:
            raise NoRange("in symbols the graphs hold more than the budget")
        links = links_of(emitted, asked.num_forward_outputs)
        return replace(planned, decided=emitted, rehearsal=rehearsal, evidence=evidence, links=links)

    def inner(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        """Compile one graph; called by Inductor in place of `compile_fx_inner`."""
        from torch._inductor import config  # loads Inductor
        from torch._inductor.compile_fx import compile_fx_inner

        from memo_compile.codegen.caching.calls import around_backward, around_forward  # loads Inductor
        from memo_compile.codegen.caching.code import BackwardFacts, ForwardFacts, PlannedCode  # loads Inductor

        planned = self.course.phase
        if not isinstance(planned, Planned):  # an inference graph: nothing lives beyond the call
            self.setting.not_planned(gm, gradients_inside=self.gradients_inside, fused=True)
            with config.patch(allow_buffer_reuse=knows_all(gm)):
                return compile_fx_inner(gm, inputs, **kwargs)
        backward = bool(kwargs.get("is_backward"))
        decided, num_forward_outputs = planned.decided, planned.rehearsal.num_forward_outputs
        donated: list[int] = []
        if backward:
            donated = donatable(decided, self.course.at(ForwardEmitted).evidence.forward, num_forward_outputs)
        graph = decided.backward if backward else decided.forward
        self.setting.progress.step(f"lowering the {'backward' if backward else 'forward'}")
        compile_bodies(graph)
        tiles = tiles_of(graph)
        hooks = self._hooks(planned, backward)
        with settings_for(decided, graph), donating(donated), arena_wrapper(hooks):
            compiled = self._emitted(gm, inputs, kwargs, hooks, backward)
        planned.observer.code("backward" if backward else "forward", compiled)
        device, lease_at = self.setting.device, lease_output(decided, num_forward_outputs)
        if not backward:
            nothing_donated()  # `around_backward` provides for a second backward
            kept = self.setting.keeps(decided.forward, num_forward_outputs)
            front = ForwardFacts(self.key or "", kept, lease_at)
            return PlannedCode(compiled, tiles, front, around_forward(compiled, front, self.setting, self._schedule))
        plan = placed_plan(self.course.at(Planned))
        record(plan)
        leased = lease_input(decided) if lease_at is not None else None
        back = BackwardFacts(self.key or "", leased, tuple(donated), self._schedule(), plan, planned.told)
        run = planned.observer.measured("backward", around_backward(compiled, back, self.setting), device)
        return PlannedCode(compiled, tiles, back, self.setting.first_step.backward(run))

    def _emitted(
        self, gm: fx.GraphModule, inputs: Sequence[Any], kwargs: dict[str, Any], hooks: Hooks, backward: bool
    ) -> Any:
        """What Inductor compiles of a graph, from where its dry run ended if that was of the same."""
        from torch._inductor.compile_fx import compile_fx_inner  # loads Inductor

        planned = self.course.at(Planned)
        lowered = planned.evidence.lowered[backward]
        if lowered is None or not lowered.is_of(gm, inputs, kwargs):
            if lowered is not None:
                log.debug("%s: Inductor is given a graph other than that of its dry run", self.setting.name)
            return compile_fx_inner(gm, inputs, **kwargs)
        self.course.advance(replace(planned, evidence=gone_on_with(planned.evidence, backward)))  # it is large
        with lowered.gone_on_with(hooks, kwargs.get("graph_id")):
            return compile_fx_inner(lowered.gm, inputs, **kwargs)

    def _hooks(self, planned: Planned, backward: bool) -> Hooks:
        """What the wrapper calls while it emits a graph."""
        poison = self.setting.options.verify == "poison"
        arrangement = planned.evidence.arrangement
        return Hooks(
            self._place_backward if backward else self._place_forward,
            self._inspect_backward if backward else self._inspect_forward,
            partial(self._poisoned, backward=backward) if poison else direct,
            partial(arrangement.lines, backward=backward) if arrangement is not None else None,
            planned.rehearsal.device_name(),
        )

    def _schedule(self) -> Schedule | None:
        """What may be started early, once the backward is there."""
        phase = self.course.phase
        return phase.schedule if isinstance(phase, BackwardEmitted) else None

    def _place_forward(self, body: Body) -> tuple[Sequence[ArenaBuffer], Sequence[ArenaSegment]]:
        planned = self.course.at(Planned)
        evidence = planned.evidence
        layout = evidence.layout
        if evidence.forward != body:
            log.debug("%s: the forward differs from its dry run and is placed again", self.setting.name)
            layout = planned.rehearsal.layout(planned.decided, body, evidence.backward)
        evidence = self._within_budget(planned, replace(evidence, forward=body, layout=layout))
        self.course.advance(replace(planned, evidence=evidence))
        return buffers_of(Side.FORWARD, layout.buffers), layout.segments

    def _place_backward(self, body: Body) -> tuple[Sequence[ArenaBuffer], Sequence[ArenaSegment]]:
        planned = self.course.at(ForwardEmitted)
        evidence, rehearsal = planned.evidence, planned.rehearsal
        layout, forward = evidence.layout, evidence.forward
        if body != evidence.backward:
            log.debug("%s: the backward differs from its dry run and is placed again", self.setting.name)
            placed = {b.name for b in buffers_of(Side.FORWARD, layout.buffers)}
            if self.scalar and placed & handed_on(forward, body, planned.links):
                raise _Exceeded(planned)  # the forward's code has put into the arena what the user is to keep
            layout = plan_arena(**rehearsal.arena_arguments(planned.decided, forward, body), emitted=layout)
        evidence = self._within_budget(planned, replace(evidence, backward=body, layout=layout))
        self.course.advance(replace(planned, evidence=evidence))
        return buffers_of(Side.BACKWARD, layout.buffers), layout.segments

    def _within_budget(self, planned: Planned, evidence: Evidence) -> Evidence:
        budget, peak = planned.rehearsal.budget, evidence.layout.peak
        if budget is None or peak <= budget:
            return evidence
        if self.scalar:
            raise _Exceeded(planned)
        raise BudgetTooSmall(budget, peak, planned.decided.peak_tensors)

    def _poisoned(self, lines: Sequence[str], backward: bool) -> tuple[Sequence[str], Sequence[str]]:
        planned = self.course.at(Planned)
        layout, outputs = planned.evidence.layout, planned.evidence.forward.outputs
        if not backward:
            return [IMPORT], poisoned(lines, buffers_of(Side.FORWARD, layout.buffers), 0)
        received = {str(outputs[link.output]): link.input for link in planned.links}
        saved = buffers_of(Side.FORWARD, layout.buffers)
        kept = kept_for_backward(saved, layout.segments, layout.forward_steps, received)
        return [IMPORT], poisoned(lines, buffers_of(Side.BACKWARD, layout.buffers), layout.forward_steps, kept)

    def _report(self, lost: Sequence[str]) -> None:
        if lost:
            log.info("%s: %d copies run by themselves; the first: %s", self.setting.name, len(lost), lost[0])

    def _inspect_forward(self, lines: Sequence[str], outputs: Sequence[str], inputs: Sequence[str]) -> None:
        planned = self.course.at(Planned)
        regions = read_regions(lines, outputs, inputs)
        verify_emitted(regions)
        self._report(check_order(planned_steps(planned.decided.forward), emitted_steps(lines)))
        self.course.advance(next_phase(planned, ForwardEmitted, regions=regions))

    def _inspect_backward(self, lines: Sequence[str], outputs: Sequence[str], inputs: Sequence[str]) -> None:
        planned = self.course.at(ForwardEmitted)
        self._report(check_order(planned_steps(planned.decided.backward), emitted_steps(lines)))
        check_prefetched_reads(lines)
        check_arrivals()
        schedule = early_schedule(planned.rehearsal, planned.evidence.layout, lines)
        links = [(link.output, link.input) for link in planned.links]
        verify_emitted(planned.regions, read_regions(lines, outputs, inputs), links)
        self.course.advance(next_phase(planned, BackwardEmitted, schedule=schedule))
