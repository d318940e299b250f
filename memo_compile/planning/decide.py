"""From a prepared graph to a plan and the graphs that carry it out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch.fx as fx

from memo_compile.errors import HostBudgetTooSmall
from memo_compile.passes import pipeline
from memo_compile.passes.analysis.layers import LayerInfo
from memo_compile.passes.analysis.peak_tensors import peak_tensors
from memo_compile.passes.fx.facts import (
    HOST_LEASE,
    is_on_host,
    nbytes,
)
from memo_compile.passes.fx.meta import LAYER
from memo_compile.passes.pipeline import Watch, act, unwatched
from memo_compile.passes.transforms.residency import Residency
from memo_compile.passes.transforms.slices import Sliced
from memo_compile.planning import rounding
from memo_compile.planning.equal_layers import with_equal_layers
from memo_compile.planning.prepared import DRAWN_AGAIN, Prepared, graph_peak, held_between, step_seconds
from memo_compile.planning.problem import Limits, View, problems_of, view_of
from memo_compile.planning.residency import Decision, Problem
from memo_compile.planning.search import best_of
from memo_compile.planning.summary import (
    activation_plan,
    activation_plans,
    blank_plan,
    largest_at_peak,
    makers_of,
    recomputed_flops,
)
from memo_compile.planning.tiling import with_tiles
from memo_compile.schema import Cause, Plan
from memo_compile.workspaces.annotate import workspaces_in

HOST_ROUNDS = 3  # in which plans that miss the host budget by a few slices aim lower
MISSED = 1.02  # of the peak that the program knows


@dataclass(frozen=True, kw_only=True)
class CarriedOut:
    """Two graphs, and the homes that they carry out.

    `saved` are the values that the forward hands over, by name; `overlap` says whether transfers overlap with compute.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[str, ...]
    residency: Mapping[str, Residency] = field(default_factory=dict)
    overlap: bool = True


@dataclass(frozen=True, kw_only=True)
class Decided(CarriedOut):
    """A plan and the graphs that carry it out. `peak_tensors` are the largest tensors at the worst moment, in words.

    `limits` are those that it was decided within, `problem` what the linear program was given.
    """

    plan: Plan
    limits: Limits
    peak_tensors: tuple[str, ...] = ()
    problem: Problem | None = None


def lease_output(decided: CarriedOut, num_forward_outputs: int) -> int | None:
    """Which output of the forward is the host lease; None where nothing is offloaded."""
    (output,) = decided.forward.graph.find_nodes(op="output")
    outputs = output.args[0]
    return next((i for i in range(num_forward_outputs, len(outputs)) if _is_lease(outputs[i])), None)


def lease_input(decided: CarriedOut) -> int:
    """Which input of the backward is the host lease, where there is one."""
    names = [n.name for n in decided.backward.graph.find_nodes(op="placeholder")]
    return names.index(HOST_LEASE)


def _is_lease(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_on_host(node)


@dataclass(frozen=True)
class _Choice:
    """Homes, and the graphs that they make."""

    problem: Problem
    decision: Decision
    residency: dict[str, Residency]
    overlap: bool
    sliced: Sliced


def _within_host(p: Prepared, limits: Limits, watch: Watch) -> _Choice:
    """Homes whose slices fit in host memory as they lie there, whole and aligned: the program counts bare bytes.

    Raises:
        HostBudgetTooSmall: everything is to be offloaded, and does not fit.
    """
    choice, host = _chosen(p, limits, limits.host, watch), limits.host
    for rounds_left in reversed(range(HOST_ROUNDS)):
        excess = limits.calls * choice.sliced.host_bytes - limits.host
        if excess <= 0:
            return choice
        if limits.offload == "all":
            raise HostBudgetTooSmall(choice.sliced.host_bytes, limits.calls, limits.host)
        host = max(0, host - 2 * excess) if rounds_left else 0  # without offloading at last
        choice = _chosen(p, limits, host, watch)
    return choice


def _layers_of(p: Prepared) -> dict[str, LayerInfo]:
    """The layer of each saved value that has one, by name."""
    return {n.name: n.meta[LAYER] for n in p.saved if LAYER in n.meta}


def _chosen(p: Prepared, limits: Limits, host: int, watch: Watch) -> _Choice:
    """Homes for `host` bytes of host memory.

    What the program gains by values that come more than once is not always there: then the plan without is looked at.
    """
    view = view_of(p, replace(limits, host=host))
    choice = _chosen_of(p, view, limits, watch)
    if choice.problem.again and _peak_of(p, choice) > MISSED * choice.decision.peak:
        return min(choice, _chosen_of(p, view, limits, watch, again=False), key=partial(_peak_of, p))
    return choice


def _peak_of(p: Prepared, choice: _Choice) -> int:
    sliced = choice.sliced
    return graph_peak(sliced.forward, sliced.backward, sliced.saved, p.num_forward_outputs, p.fused)


def _chosen_of(p: Prepared, view: View, limits: Limits, watch: Watch, *, again: bool = True) -> _Choice:
    everything = limits.offload == "all"
    if everything:
        (problem, *_), fits = problems_of(view), True
        decision = rounding.all_offloaded(problem, time_limit=limits.time_limit)
    else:
        problem, decision, fits = best_of(view, limits, again=again)
        if fits and p.fused and limits.objective == "time" and not problem.again:  # op by op nothing is compiled
            decision = with_equal_layers(problem, decision, _layers_of(p), time_limit=limits.time_limit)
    residency = {a.name: replace(decision.residency[a.name], axis=view.axes[a.name]) for a in problem.activations}
    # What comes more than once does so where it is needed: it would stay in memory else.
    overlap = fits and not problem.again and (everything or limits.objective == "time")
    sliced = carry_out(p, residency, overlap=overlap, host_budget=limits.host_in_all, watch=watch)
    return _Choice(problem, decision, residency, overlap, sliced)


def decide(p: Prepared, limits: Limits, *, name: str, backend: str, watch: Watch = unwatched) -> Decided:
    """Choose homes within `limits` and build the graphs that carry them out, as `watch` is shown.

    Where no plan fits the budget, the smallest is returned: only the arena tells whether it really is too large.

    Raises:
        HostBudgetTooSmall: everything is to be offloaded, and does not fit in host memory.
    """
    started = time.perf_counter()
    p, everything = with_tiles(p, limits), limits.offload == "all"
    if not p.plannable:
        return replace(_unplanned(p, limits, name, backend, started), peak_tensors=(DRAWN_AGAIN, *largest_at_peak(p)))
    roomy = limits.budget is None or limits.budget >= p.unplanned_peak
    if not everything and limits.objective == "time" and roomy and not p.policies.offloaded and p.tiling is None:
        return _unplanned(p, limits, name, backend, started)
    choice = _within_host(p, limits, watch)
    decision, residency, sliced = choice.decision, choice.residency, choice.sliced
    peak = graph_peak(sliced.forward, sliced.backward, sliced.saved, p.num_forward_outputs, p.fused)
    peak += (limits.calls - 1) * held_between(sliced.forward)
    plan = replace(
        blank_plan(p, limits, name, backend),
        predicted_peak=peak,
        predicted_seconds=decision.seconds,
        host_bytes=sliced.host_bytes,
        recomputed_flops=recomputed_flops(p, residency),
        solver="none: everything is offloaded" if everything else "highs",
        seconds=time.perf_counter() - started,
        binding=decision.binding,
        prices=dict(decision.prices),
        activations=activation_plans(p, residency, limits),
    )
    plan = replace(plan, workspaces=workspaces_in(sliced.forward, sliced.backward))
    in_the_way = peak_tensors(sliced.forward, sliced.backward, frozenset(sliced.saved), makers_of(p), p.fused)
    return Decided(
        forward=sliced.forward,
        backward=sliced.backward,
        saved=sliced.saved,
        residency=residency,
        overlap=choice.overlap,
        plan=plan,
        limits=limits,
        peak_tensors=in_the_way,
        problem=choice.problem,
    )


def carry_out(
    p: Prepared, residency: Mapping[str, Residency], *, overlap: bool, host_budget: int, watch: Watch = unwatched
) -> Sliced:
    """Build the graphs: what is recomputed whole is not saved, the rest gets its slices and transfers.

    With `overlap`, transfers run beside the computation; without, nothing waits in memory for a link. `watch` is shown
    both graphs after each pass, with the pass's name; the next pass rewrites them in place.
    """
    decision = pipeline.Decision(
        joint=p.joint,
        saved=p.saved,
        residency=residency,
        host_budget=host_budget,
        overlap=overlap,
        seconds=partial(step_seconds, p),
        profile=p.profile,
        fused=p.fused,
        workspaces=p.workspaces.annotate,
        tiling=p.tiling,
    )
    return act(decision, p.unplanned, watch)


def _unplanned(p: Prepared, limits: Limits, name: str, backend: str, started: float) -> Decided:
    split = p.unplanned
    nodes = {n.name: n for n in split.forward.graph.nodes}
    scheduled = [*split.forward.graph.nodes, *split.backward.graph.nodes]
    kept = [nodes[n] for n in split.saved if n in nodes and nodes[n].op != "placeholder"]
    whole = Residency(1, 0, 0)
    plan = replace(
        blank_plan(p, limits, name, backend),
        predicted_seconds=sum(step_seconds(p, n) for n in scheduled),
        seconds=time.perf_counter() - started,
        activations=tuple(activation_plan(n, whole, Cause.FITS) for n in kept if nbytes(n)),
        workspaces=workspaces_in(split.forward, split.backward),
    )
    return decided_unplanned(p, limits, plan)


def decided_unplanned(p: Prepared, limits: Limits, plan: Plan) -> Decided:
    """A plan that moves nothing, and torch's own split, which carries it out."""
    split = p.unplanned
    return Decided(forward=split.forward, backward=split.backward, saved=split.saved, plan=plan, limits=limits)
