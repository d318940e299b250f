"""`memo`: plan a graph within Inductor's compilation, and emit it with the arena.

Inductor hands the joint graph to `_Compilation.partition`, which plans and looks at dry runs of what it decided, and
then both graphs to `_Compilation.inner`, which compiles them with buffers at the offsets of one layout.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `compile_fx(inner_compile, config_patches)`,
`custom_partitioner_fn`, and `torch._C._autograd._get_current_graph_task_keep_graph`.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config

from memo_compile.codegen.arena.layout import CHUNK, ArenaLayout, Link, handed_on, plan_arena
from memo_compile.codegen.arrange import Arrangement, arrangement_of, rearranged, step_seconds
from memo_compile.codegen.donation import donating, nothing_donated
from memo_compile.codegen.emitted.body import Body
from memo_compile.codegen.emitted.landings import how_many_early, schedule_of
from memo_compile.codegen.emitted.poison import IMPORT, kept_for_backward, poisoned
from memo_compile.codegen.emitted.verifier import EmittedRegions, read_regions, verify_emitted
from memo_compile.codegen.kernels import kernels_beside
from memo_compile.codegen.lowerings import POISON
from memo_compile.codegen.mutations import in_place_where_known, readers_before_writers
from memo_compile.codegen.preview import dry_emission
from memo_compile.codegen.scheduler.dependencies import knows_all
from memo_compile.codegen.scheduler.fusion import wait_for_products
from memo_compile.codegen.scheduler.lost_dependencies import Waits, added_waits, restored
from memo_compile.codegen.scheduler.order import (
    check_landings,
    check_order,
    emitted_steps,
    place_transfers,
    planned_steps,
)
from memo_compile.codegen.wrapper import Emission, Hooks, arena_wrapper
from memo_compile.errors import BudgetTooSmall
from memo_compile.logs import logger
from memo_compile.options import Options
from memo_compile.passes.fx.facts import check_sizes, nbytes
from memo_compile.passes.fx.meta import LAYER
from memo_compile.passes.fx.ranges import NoRange, has_symbols, write_numbers
from memo_compile.passes.transforms.partition import num_mutated_outputs, received
from memo_compile.planning.decide import Decided, lease_input, lease_output
from memo_compile.planning.fit_budget import WORTHWHILE, Settled, settle
from memo_compile.planning.prepared import Prepared, prepare
from memo_compile.report.dumps import Dump
from memo_compile.runtime.ahead import Schedule
from memo_compile.runtime.calls import backward_call, boxed, forward_call
from memo_compile.runtime.first_step import FirstStep
from memo_compile.runtime.outstanding import noted
from memo_compile.schema import ArenaBuffer, ArenaSegment, Plan
from memo_compile.trace.captured import takes_gradients
from memo_compile.trace.ranks import together
from memo_compile.trace.setting import Setting, check_planned, limits_for, record, setting_for

UNLIMITED = 1 << 62  # CUDA's caching allocator hands large blocks out again

log = logger(__name__)


def compile_planned(gm: fx.GraphModule, inputs: Sequence[Any], setting: Setting) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor, planned and placed."""
    with _collection_paused(), kernels_beside(), readers_before_writers(), in_place_where_known():
        return _compiled(gm, inputs, setting)


def _compiled(gm: fx.GraphModule, inputs: Sequence[Any], setting: Setting) -> Callable[..., Any]:
    run = _Compilation(setting, _num_outputs(gm), setting.first_step, gradients_inside=takes_gradients(gm))
    try:
        compiled: Any = _through_inductor(run, run.inner, gm, inputs)
    except _Exceeded:
        log.info("%s: what was emitted is not what dry runs showed; planned again from closer ones", setting.name)
        rounds = run.plan.rounds if run.plan is not None else 0
        run = replace(run, scalar=False, rounds=rounds)
        compiled = _through_inductor(run, run.inner, gm, inputs)
    if run.dump is not None:
        compiled = run.dump.measured("forward", compiled, setting.device)
    return run.first_step.forward(compiled)


@dataclass(frozen=True)
class Looked:
    """A graph that was planned and placed, and not compiled."""

    plan: Plan
    prepared: Prepared
    decided: Decided
    layout: ArenaLayout


class _Planned(BaseException):
    """Ends a compilation once the plan is made. Not an `Exception`: nothing wraps it."""


class _Exceeded(BaseException):
    """Ends a compilation whose emitted code is not what a dry run promised. Not an `Exception`: nothing wraps it."""


def look(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Looked | None:
    """Plan a Dynamo graph as `compile_planned` does, from dry runs, and stop; None where it needs no gradient."""
    setting = setting_for(options, inputs)
    run = _Compilation(setting, _num_outputs(gm), setting.first_step)

    def stop(*_: Any, **__: Any) -> Any:
        raise _Planned

    with contextlib.suppress(_Planned), _collection_paused(), readers_before_writers(), in_place_where_known():
        _through_inductor(run, stop, gm, inputs)
    if run.plan is None or run.prepared is None or run.decided is None or run.evidence is None:
        return None
    run.layout = run.evidence.layout
    return Looked(run.placed_plan(), run.prepared, run.decided, run.layout)


def _through_inductor(
    run: _Compilation, inner: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options  # loads Inductor
    from torch._inductor.compile_fx import compile_fx

    options = run.setting.options
    patches: dict[str, Any] = {
        **(list_mode_options(options.mode) if options.mode else {}),
        **options.inductor,
        "custom_partitioner_fn": _partitioner(run),
        # Reuse merges live ranges before memo sees them; partitions would cut the body in pieces.
        "allow_buffer_reuse": False,
        "graph_partition": False,
        # Neither cache knows of plans: a hit would bring another plan's offsets, or none.
        "fx_graph_cache": False,
    }
    with functorch_config.patch(
        enable_autograd_cache=False, donated_buffer=False, force_non_lazy_backward_lowering=True
    ):
        compiled: Any = compile_fx(gm, list(inputs), inner_compile=inner, config_patches=patches)
    return compiled


def _num_outputs(gm: fx.GraphModule) -> int:
    (output,) = gm.graph.find_nodes(op="output")
    return len(output.args[0]) if isinstance(output.args[0], (tuple, list)) else 1


def _partitioner(run: _Compilation) -> Any:
    from torch._inductor.custom_graph_pass import CustomPartitionerFn  # loads Inductor

    class Partitioner(CustomPartitionerFn):
        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            static = kwargs.get("static_lifetime_input_indices")
            return run.partition(gm, joint_inputs, kwargs["num_fwd_outputs"], static)

        def uuid(self) -> None:
            return None  # not to be cached

    return Partitioner()


@dataclass(frozen=True)
class _Evidence:
    """What a dry run of both graphs showed, and where their buffers would lie.

    `arrangement` says how lines were moved so that copies overlap, None where they stand as Inductor has them.
    `seconds` is a replay of both; None where nothing is moved to the host and back.
    """

    forward: Body
    backward: Body
    layout: ArenaLayout
    arrangement: Arrangement | None = None
    seconds: float | None = None


@dataclass
class _Compilation:
    """One graph's way through Inductor. Inductor calls `partition`, then `inner` for the forward and the backward."""

    setting: Setting
    num_user_outputs: int
    first_step: FirstStep
    gradients_inside: bool = False
    prepared: Prepared | None = None
    decided: Decided | None = None
    plan: Plan | None = None
    evidence: _Evidence | None = None
    layout: ArenaLayout | None = None
    links: tuple[Link, ...] = ()
    num_forward_outputs: int = 0
    static: tuple[int, ...] = ()
    dump: Dump | None = None
    forward_body: Body | None = None
    regions: EmittedRegions | None = None
    schedule: Schedule | None = None
    budget: int | None = None
    scalar: bool = True
    rounds: int = 0  # before
    layers: dict[str, int] = field(default_factory=dict)

    def partition(
        self, joint: fx.GraphModule, inputs: Any, num_forward_outputs: int, static: list[int] | None
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Plan the joint graph; returns its forward and backward."""
        started = time.perf_counter()
        self.num_forward_outputs, self.static = num_forward_outputs, tuple(static or ())
        check_sizes(joint)
        if has_symbols(joint):
            raise NoRange("not yet")
        write_numbers(joint)
        self.dump = Dump.open(self.setting.options.dump, self.setting.name)
        self.dump.joint(joint, num_forward_outputs, static)
        p = prepare(joint, inputs, num_forward_outputs, static, self.setting.profile, fused=True, watch=self.dump.watch)
        self.layers = {n.name: n.meta[LAYER].index for n in joint.graph.nodes if LAYER in n.meta}
        budget = self.setting.options.memory_budget
        # A ratio is of what Inductor holds; of bytes it is asked only where that may be within them.
        if isinstance(budget, float) or (isinstance(budget, int) and budget > WORTHWHILE * p.unplanned_peak):
            p = replace(p, unplanned_peak=self._unplanned_peak(p))
        with together(joint) as ranks:
            limits = ranks.agree(limits_for(self.setting, p.unplanned_peak))
            self.budget = limits.budget
            settled: Settled[_Evidence] = settle(p, limits, self._looked_at, name=self.setting.name, backend="memo")
            ranks.confirm(settled.decided)
        check_planned(self.setting, limits, settled.decided, settled.peak)
        if limits.budget is not None and settled.peak > limits.budget:
            self.budget = None  # the least that there is was taken
        self.prepared, self.decided, self.evidence = p, settled.decided, settled.evidence
        self.plan = replace(
            self.decided.plan,
            budget=limits.given(settled.peak),
            rounds=self.rounds + settled.rounds,
            seconds=time.perf_counter() - started,
        )
        self.links = _links(self.decided, num_forward_outputs)
        self.dump.decided(p, self.decided, self.setting.options)
        return self.decided.forward, self.decided.backward

    def _unplanned_peak(self, p: Prepared) -> int:
        split = p.unplanned
        plain = Decided(_NO_PLAN, split.forward, split.backward, split.saved)
        return self._dry(plain).layout.peak

    def _looked_at(self, decided: Decided) -> tuple[int, _Evidence]:
        if self.setting.options.verify == "poison":
            for node in (*decided.forward.graph.nodes, *decided.backward.graph.nodes):
                node.meta[POISON] = True
        evidence = self._dry(decided)
        return evidence.layout.peak, evidence

    def _dry(self, decided: Decided) -> _Evidence:
        with _settings_for(decided, decided.forward):
            forward = dry_emission(
                decided.forward,
                is_backward=False,
                user_visible=self._user_visible(decided.forward),
                static_inputs=self.static,
                scalar=self.scalar,
                device=self._device(),
            )
            backward = self._dry_backward(decided, forward.body)
        plain = _Evidence(forward.body, backward.body, self._layout(decided, forward.body, backward.body))
        if not any(h.offloaded for h in decided.homes.values()):
            return plain
        plain = replace(plain, seconds=step_seconds((forward, backward), self.setting.profile))
        return plain if decided.ahead else self._overlapping(decided, forward, backward, plain)

    def _overlapping(self, decided: Decided, forward: Emission, backward: Emission, plain: _Evidence) -> _Evidence:
        """The same with transfers moved so that they overlap, if the arena holds no more for it."""
        profile, links = self.setting.profile, _links(decided, self.num_forward_outputs)
        arrangement = arrangement_of(forward, backward, profile, links, self.num_forward_outputs)
        front = rearranged(forward, arrangement.lines(forward, backward=False))
        back = rearranged(backward, arrangement.lines(backward, backward=True))
        layout = self._layout(decided, front.body, back.body)
        if layout.peak > plain.layout.peak:
            return plain
        return _Evidence(front.body, back.body, layout, arrangement, step_seconds((front, back), profile))

    def _layout(self, decided: Decided, forward: Body, backward: Body) -> ArenaLayout:
        arguments = self._arena_arguments(decided, forward, backward)
        plain = plan_arena(**arguments)
        if not backward.landings or not decided.ahead:
            return plain
        # Where it costs nothing, or the budget has room, slices land in storages that a call before can take.
        alone = plan_arena(**arguments, alone=frozenset(f"bw:{name}" for name in backward.landings))
        budget = self.budget if self.budget is not None else plain.peak
        return alone if alone.peak <= max(plain.peak, budget) else plain

    def _schedule(self, lines: Sequence[str]) -> Schedule:
        """What calls before this backward may start for it: never more than one arena beside their own."""
        assert self.layout is not None
        layout, schedule = self.layout, schedule_of(lines)
        starts = {b.name: b.start for b in layout.buffers}
        sizes = [(starts[f"bw:{landing.buffer}"], landing.nbytes) for landing in schedule.early]
        early = how_many_early(sizes, layout.held, layout.forward_steps, layout.arena_bytes)
        if self.budget is not None:
            while early and layout.peak + sum(size for _, size in sizes[:early]) > self.budget:
                early -= 1
        poison = self.setting.options.verify == "poison"
        return replace(schedule, early=schedule.early[:early], poison=poison)

    def _arena_arguments(self, decided: Decided, forward: Body, backward: Body) -> dict[str, Any]:
        placeholders = decided.backward.graph.find_nodes(op="placeholder")
        return {
            "forward": forward,
            "backward": backward,
            "links": _links(decided, self.num_forward_outputs),
            "user_outputs": self.num_forward_outputs,
            "tangents": {n.name: nbytes(n) for n in placeholders if "tangents" in str(n.target)},
            "chunk": CHUNK if self.setting.device.type == "cpu" else UNLIMITED,
            "layer_of": self._layer_of("fw", forward) | self._layer_of("bw", backward),
        }

    def _layer_of(self, side: str, body: Body) -> dict[str, int]:
        """The layer of each buffer that a node of one makes; its forward and its backward count as two."""
        return {
            f"{side}:{name}": 2 * self.layers[origin] + (side == "bw")
            for name, origin in body.origins.items()
            if origin in self.layers
        }

    def _dry_backward(self, decided: Decided, forward: Body) -> Emission:
        links = _links(decided, self.num_forward_outputs)
        strides = {link.input: forward.strides[link.output] for link in links}
        (output,) = decided.backward.graph.find_nodes(op="output")
        with _settings_for(decided, decided.backward), donating(_donatable(decided, forward, self.num_forward_outputs)):
            return dry_emission(
                decided.backward,
                is_backward=True,
                user_visible=[i for i, n in enumerate(output.args[0]) if isinstance(n, fx.Node)],
                input_strides={name: s for name, s in strides.items() if s is not None},
                scalar=self.scalar,
                device=self._device(),
            )

    def _device(self) -> str:
        """The device that is planned for, as Inductor names it."""
        device = self.setting.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return str(device)

    def _user_visible(self, forward: fx.GraphModule) -> list[int]:
        first = num_mutated_outputs(forward)
        (output,) = forward.graph.find_nodes(op="output")
        shown = range(first, first + self.num_user_outputs)
        return [i for i in shown if isinstance(output.args[0][i], fx.Node)]

    def inner(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        """Compile one graph; called by Inductor in place of `compile_fx_inner`."""
        from torch._inductor import config  # loads Inductor
        from torch._inductor.compile_fx import compile_fx_inner

        if self.decided is None:  # an inference graph: nothing lives beyond the call
            self.setting.not_planned(gm, gradients_inside=self.gradients_inside, fused=True)
            with config.patch(allow_buffer_reuse=knows_all(gm)):
                return compile_fx_inner(gm, inputs, **kwargs)
        backward = bool(kwargs.get("is_backward"))
        donated: list[int] = []
        if backward:
            assert self.forward_body is not None
            donated = _donatable(self.decided, self.forward_body, self.num_forward_outputs)
        place = self._place_backward if backward else self._place_forward
        inspect = self._inspect_backward if backward else self._inspect_forward
        graph = self.decided.backward if backward else self.decided.forward
        finish = (lambda lines: self._poisoned(lines, backward)) if self.setting.options.verify == "poison" else None
        arrangement = self.evidence.arrangement if self.evidence is not None else None
        arrange = partial(arrangement.lines, backward=backward) if arrangement is not None else None
        hooks = Hooks(place, inspect, finish, arrange, self._device())
        with _settings_for(self.decided, graph), donating(donated), arena_wrapper(hooks):
            compiled: Any = compile_fx_inner(gm, inputs, **kwargs)
        assert self.dump is not None
        self.dump.code("backward" if backward else "forward", compiled)
        device, lease_at = self.setting.device, lease_output(self.decided, self.num_forward_outputs)
        if not backward:
            nothing_donated()  # `_guarded` provides for a second backward
            kept = self.setting.keeps(self.decided.forward, self.num_forward_outputs)
            run = compiled if lease_at is None else forward_call(compiled, device, lease_at, lambda: self.schedule)
            return noted(run, kept)
        record(self.placed_plan())
        called = compiled if lease_at is None else backward_call(compiled, device, lease_input(self.decided))
        return self.first_step.backward(self.dump.measured("backward", _guarded(called, donated), device))

    def _place_forward(self, body: Body) -> tuple[Sequence[ArenaBuffer], Sequence[ArenaSegment]]:
        self.forward_body = body
        assert self.evidence is not None
        assert self.decided is not None
        layout = self.evidence.layout
        if self.evidence.forward != body:
            log.debug("%s: the forward differs from its dry run and is placed again", self.setting.name)
            layout = self._layout(self.decided, body, self.evidence.backward)
        return self._settle_on(layout, body, self.evidence.backward, "fw:")

    def _place_backward(self, body: Body) -> tuple[Sequence[ArenaBuffer], Sequence[ArenaSegment]]:
        assert self.evidence is not None
        assert self.decided is not None
        layout, forward = self.evidence.layout, self.evidence.forward
        if body != self.evidence.backward:
            log.debug("%s: the backward differs from its dry run and is placed again", self.setting.name)
            placed = {b.name for b in layout.buffers}
            if self.scalar and any(f"fw:{name}" in placed for name in handed_on(forward, body, self.links)):
                raise _Exceeded  # the forward's code has put into the arena what the user is to keep
            layout = plan_arena(**self._arena_arguments(self.decided, forward, body), emitted=layout)
        return self._settle_on(layout, forward, body, "bw:")

    def _settle_on(
        self, layout: ArenaLayout, forward: Body, backward: Body, prefix: str
    ) -> tuple[Sequence[ArenaBuffer], Sequence[ArenaSegment]]:
        """Emit from this layout, if it is within the budget."""
        if self.budget is not None and layout.peak > self.budget:
            assert self.decided is not None
            if self.scalar:
                raise _Exceeded
            raise BudgetTooSmall(self.budget, layout.peak, self.decided.obstacles)
        assert self.evidence is not None
        self.evidence = replace(self.evidence, forward=forward, backward=backward, layout=layout)
        self.layout = layout
        return [b for b in layout.buffers if b.name.startswith(prefix)], layout.segments

    def _poisoned(self, lines: Sequence[str], backward: bool) -> tuple[Sequence[str], Sequence[str]]:
        assert self.layout is not None
        assert self.evidence is not None
        layout, outputs = self.layout, self.evidence.forward.outputs
        mine = [b for b in layout.buffers if b.name.startswith("bw:" if backward else "fw:")]
        if not backward:
            return [IMPORT], poisoned(lines, mine, 0)
        received = {f"fw:{outputs[link.output]}": link.input for link in self.links}
        kept = kept_for_backward(layout.buffers, layout.segments, layout.forward_steps, received)
        return [IMPORT], poisoned(lines, mine, layout.forward_steps, kept)

    def _report(self, lost: Sequence[str]) -> None:
        if lost:
            log.info("%s: %d copies run by themselves; the first: %s", self.setting.name, len(lost), lost[0])

    def _inspect_forward(self, lines: Sequence[str], outputs: Sequence[str], inputs: Sequence[str]) -> None:
        assert self.decided is not None
        self.regions = read_regions(lines, outputs, inputs)
        verify_emitted(self.regions)
        self._report(check_order(planned_steps(self.decided.forward), emitted_steps(lines)))

    def _inspect_backward(self, lines: Sequence[str], outputs: Sequence[str], inputs: Sequence[str]) -> None:
        assert self.decided is not None
        assert self.regions is not None
        self._report(check_order(planned_steps(self.decided.backward), emitted_steps(lines)))
        check_landings(lines)
        self.schedule = self._schedule(lines)
        links = [(link.output, link.input) for link in self.links]
        verify_emitted(self.regions, read_regions(lines, outputs, inputs), links)

    def placed_plan(self) -> Plan:
        """The plan with what the layout says, written to the dump."""
        assert self.plan is not None
        assert self.layout is not None
        assert self.dump is not None
        layout, seconds = self.layout, self.evidence.seconds if self.evidence is not None else None
        smallest = self.setting.options.memory_budget == "min"
        plan = replace(
            self.plan,
            predicted_peak=layout.peak,
            predicted_seconds=self.plan.predicted_seconds if seconds is None else seconds,
            least_peak=layout.peak if smallest else min(self.plan.least_peak, layout.peak),
            unplanned_peak=self.plan.unplanned_peak if self.decided and self.decided.homes else layout.peak,
            arena_bytes=layout.arena_bytes,
            lower_bound=layout.lower_bound,
            coverage=layout.coverage,
            segments=layout.segments,
            buffers=layout.buffers,
        )
        self.dump.plan(plan)
        if self.decided is not None and self.evidence is not None:
            emitted = self._arena_arguments(self.decided, self.evidence.forward, self.evidence.backward)
            self.dump.emitted(emitted)
            assert self.prepared is not None
            self.dump.report(self.prepared, self.decided, plan, emitted)
        return plan


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Within, garbage is not collected: in graphs and symbols that takes a fifth of the time, and hardly frees any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_NO_PLAN = Plan("", "memo", None, 0, 0, 0, 0.0, 0, 0, 0, "", 0.0, "", "", ())


def _links(decided: Decided, num_forward_outputs: int) -> tuple[Link, ...]:
    """Which forward output is which backward input: saved values come first among these."""
    inputs = received(decided.backward, len(decided.saved))
    return tuple(Link(num_forward_outputs + i, node.name) for i, node in enumerate(inputs))


def _donatable(decided: Decided, forward: Body, num_forward_outputs: int) -> list[int]:
    """Backward inputs into whose bytes the backward may write once it has read them: memo's own, and no one else's."""
    for_user = set(forward.outputs[:num_forward_outputs])
    storages = forward.outputs[num_forward_outputs : num_forward_outputs + len(decided.saved)]
    positions = {n.name: i for i, n in enumerate(decided.backward.graph.find_nodes(op="placeholder"))}
    return [
        positions[node.name]
        for node, name in zip(received(decided.backward, len(storages)), storages, strict=True)
        if name is not None
        and forward.storages[name].kind == "allocated"
        and name not in for_user
        and storages.count(name) == 1
    ]


@contextlib.contextmanager
def _settings_for(decided: Decided, graph: fx.GraphModule) -> Iterator[None]:
    """Products and transfers stay where the plan has them: Inductor's own order for memory knows of no overlap."""
    from torch._inductor import config  # loads Inductor

    moves = any(h.offloaded for h in decided.homes.values())
    place = place_transfers(planned_steps(graph)) if moves else None
    waits: Waits = {}

    def before_fusion(nodes: list[Any]) -> list[Any]:
        nodes = wait_for_products(nodes)
        waits.update(added_waits(nodes))
        return nodes

    def behind_fusion(nodes: list[Any]) -> list[Any]:
        nodes = restored(nodes, waits)
        return place(nodes) if place is not None else nodes

    settings: dict[str, Any] = {}
    if decided.homes:
        settings["_pre_fusion_custom_pass"] = before_fusion
        settings["_post_fusion_custom_pass"] = behind_fusion
    if moves:
        settings["reorder_for_peak_memory"] = False
    with config.patch(settings):
        yield


def _guarded(compiled: Any, donated: list[int]) -> Callable[[list[Any]], Any]:
    """The backward; where autograd keeps the graph for another one, it works on copies of what it overwrites."""

    def run(args: list[Any]) -> Any:
        if donated and torch._C._autograd._get_current_graph_task_keep_graph():
            for i in donated:
                args[i] = args[i].clone()
        return compiled(args)

    return boxed(run)
