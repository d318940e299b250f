"""From a joint graph to a plan: annotates with the passes, asks the linear program, says why.

Pure: nothing is compiled, no tensor data is touched. `backend` and the `memo plan` command both come here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import torch.fx as fx

from memo_compile.errors import HostBudgetExceeded, SolverOutOfTime
from memo_compile.hardware.profiles import DeviceProfile
from memo_compile.logs import logger
from memo_compile.passes.analysis.costs import Cost, Timer
from memo_compile.passes.analysis.layers import LayerReport
from memo_compile.passes.analysis.liveness import last_reads, lifetimes
from memo_compile.passes.analysis.peak_tensors import obstacles
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo, TokenReport
from memo_compile.passes.analysis.user_checkpoints import Policies
from memo_compile.passes.fx.facts import (
    HOST_LEASE,
    draws_from_seed,
    is_dense,
    is_on_host,
    is_seed,
    is_view,
    nbytes,
    source_line,
    storage_of,
)
from memo_compile.passes.fx.meta import LAYER, TOKENS
from memo_compile.passes.pipeline import Decision, Joint, Watch, act, annotate, unwatched
from memo_compile.passes.transforms.partition import (
    Split,
    order_backward,
)
from memo_compile.passes.transforms.saved_set import SavedSet
from memo_compile.passes.transforms.slices import Homes, Sliced
from memo_compile.planning import residency
from memo_compile.planning.anchors import anchor_sets, bottlenecks, first_needed
from memo_compile.schema import ActivationPlan, Plan, Stop
from memo_compile.workspaces.annotate import Workspaces, workspaces_in

log = logger(__name__)

HOST_ROUNDS = 3  # in which plans that miss the host budget by a few slices aim lower
CLOSE = 3e-4  # of the step: how near to the bound an answer ends the search for a better set of anchors
PATIENCE = 2  # sets of anchors for which the solver may run out of time before any has an answer
DRAWN_AGAIN = (
    "by a policy of torch.utils.checkpoint random numbers must be drawn again (MUST_RECOMPUTE), and only torch's own "
    "split draws the same; leave them out of the policy (PREFER_RECOMPUTE), and they are planned"
)
SMALL = 16 * 1024  # bytes: below that an activation stays; moving it costs more than its room is worth


@dataclass(frozen=True)
class Limits:
    """What the plan may use, in bytes and seconds. `budget` is None for no limit, `slice_tokens` 0 for automatic.

    Other graphs of the step hold `beside` bytes, which `budget` leaves out. Where it is not `promised`, the least that
    there is will do.
    """

    budget: int | None
    host: int
    offload: bool | Literal["all"] = True
    recompute: bool = True
    slice_tokens: int = 0
    time_limit: float = 10.0
    objective: Literal["time", "memory"] = "time"
    beside: int = 0
    promised: bool = True

    def given(self, peak: int) -> int | None:
        """The budget of a plan that holds `peak` bytes: it is given what it needs where nothing was promised."""
        return None if self.budget is None else max(self.budget, peak)


@dataclass(frozen=True)
class Prepared:
    """A joint graph with everything found out about it that no decision changes.

    `forward` and `backward` are the split that saves `saved`, the canonical saved activations. `chains[name]` is what
    runs to make one again from the others, None where it must not run twice. `plannable` is False where only torch's
    own split is right. `policies` are those of the user's own checkpoints; `workspaces` tells
    what kernels take for themselves.
    """

    joint: fx.GraphModule
    num_forward_outputs: int
    unplanned: Split
    saved: tuple[fx.Node, ...]
    tokens: TokenReport
    layers: LayerReport
    forward: fx.GraphModule
    backward: fx.GraphModule
    chains: Mapping[str, tuple[fx.Node, ...] | None]
    costs: Mapping[str, Cost]
    seconds: Mapping[str, float]
    flops: Mapping[str, int]
    fused: bool
    profile: DeviceProfile
    unplanned_peak: int
    forward_flops: int
    plannable: bool
    policies: Policies
    workspaces: Workspaces


@dataclass(frozen=True)
class Decided:
    """A plan and the graphs that carry it out. `obstacles` are the largest tensors at the worst moment, in words.

    `limits` are those that it was decided within, `problem` what the linear program was given; `ahead` says whether
    transfers overlap with computation.
    """

    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[str, ...]
    homes: Mapping[str, Homes] = field(default_factory=dict)
    obstacles: tuple[str, ...] = ()
    limits: Limits | None = None
    ahead: bool = True
    problem: residency.Problem | None = None


def lease_output(decided: Decided, num_forward_outputs: int) -> int | None:
    """Which output of the forward is the host lease; None where nothing is offloaded."""
    (output,) = decided.forward.graph.find_nodes(op="output")
    outputs = output.args[0]
    return next((i for i in range(num_forward_outputs, len(outputs)) if _is_lease(outputs[i])), None)


def lease_input(decided: Decided) -> int:
    """Which input of the backward is the host lease, where there is one."""
    names = [n.name for n in decided.backward.graph.find_nodes(op="placeholder")]
    return names.index(HOST_LEASE)


def _is_lease(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_on_host(node)


def prepare(
    joint: fx.GraphModule,
    inputs: Any,
    num_forward_outputs: int,
    static_inputs: list[int] | None,
    profile: DeviceProfile,
    *,
    fused: bool,
    timer: Timer | None = None,
    workspaces: Workspaces | None = None,
    watch: Watch = unwatched,
) -> Prepared:
    """Annotate a joint graph: token axes, live ranges, costs, what may be recomputed and from what.

    Args:
        inputs: the joint graph's inputs, as the partitioner got them.
        static_inputs: indices of the inputs that are parameters or buffers.
        profile: the device that the costs are of.
        fused: whether a fusing compiler runs the graphs.
        timer: seconds of nodes that were measured on a device, as `graph_costs` takes them.
        workspaces: where to look for what kernels take for themselves; by default also by calling them.
        watch: is shown the joint graph after each pass, with the pass's name and what it found.
    """
    workspaces = workspaces or Workspaces(fused)
    state = Joint(
        graph=joint,
        inputs=inputs,
        num_forward_outputs=num_forward_outputs,
        static_inputs=static_inputs,
        profile=profile,
        fused=fused,
        timer=timer,
        workspaces=workspaces.annotate,
    )
    found = annotate(state, watch)
    unplanned: Split = found["unplanned"].split
    saved_set: SavedSet = found["saved_set"]
    costs: Mapping[str, Cost] = found["costs"]
    if not saved_set.plannable:
        log.warning("nothing is planned: %s", DRAWN_AGAIN)
    split = saved_set.split
    return Prepared(
        joint=joint,
        num_forward_outputs=num_forward_outputs,
        unplanned=unplanned,
        # Seeds are read by the backward only where a plan makes a draw again.
        saved=tuple(n for n in saved_set.values if n.name in split.saved or is_seed(n)),
        tokens=found["tokens"],
        layers=found["layers"],
        forward=split.forward,
        backward=order_backward(split.backward),
        chains=found["recompute_chains"],
        costs=costs,
        seconds={k: c.seconds for k, c in costs.items()},
        flops={k: int(c.flops) for k, c in costs.items()},
        fused=fused,
        profile=profile,
        unplanned_peak=graph_peak(
            unplanned.forward, unplanned.backward, unplanned.saved, num_forward_outputs, fused=fused
        ),
        forward_flops=sum(int(costs[n.name].flops) for n in split.forward.graph.nodes if n.name in costs),
        plannable=saved_set.plannable,
        policies=found["user_checkpoints"],
        workspaces=workspaces,
    )


def graph_peak(
    forward: fx.GraphModule, backward: fx.GraphModule, saved: tuple[str, ...], num_forward_outputs: int, fused: bool
) -> int:
    """The most bytes live at once while the two graphs run, in their own order: a model that the arena corrects."""
    front = lifetimes(forward, fused=fused)
    results = _results(forward, num_forward_outputs)
    held = sum(nbytes(n) for n in results if n.op != "placeholder")
    inputs = {n.name for n in forward.graph.find_nodes(op="placeholder")}
    # A saved value that is also a result is the user's: it is counted once, as a result.
    owned = frozenset(saved) - inputs - {n.name for n in results}
    back = lifetimes(backward, fused=fused, owned_inputs=owned)
    return max(max(front.live_bytes(), default=0), max(back.live_bytes(), default=0) + held)


def _results(forward: fx.GraphModule, num_forward_outputs: int) -> set[fx.Node]:
    """The storages that the forward gives to the user."""
    (output,) = forward.graph.find_nodes(op="output")
    return {storage_of(n) for n in output.args[0][:num_forward_outputs] if isinstance(n, fx.Node)}


@dataclass(frozen=True)
class View:
    """The linear program's view of a prepared graph: the problem for one set of anchors can be made from it."""

    order: tuple[str, ...]
    activations: Mapping[str, residency.Activation]
    needs: Mapping[str, tuple[str, ...]]
    axes: Mapping[str, TokenAxis | None]
    problem: residency.Problem  # without activations


def view_of(p: Prepared, limits: Limits) -> View:
    front_nodes, back_nodes = list(p.forward.graph.nodes), list(p.backward.graph.nodes)
    steps = len(front_nodes)
    results = _results(p.forward, p.num_forward_outputs)
    held = sum(nbytes(n) for n in results if n.op != "placeholder")
    movable = _movable(p, results)
    names = frozenset(n.name for n in p.saved)
    fixed = names - frozenset(movable) - {n.name for n in results} - {n.name for n in p.saved if n.op == "placeholder"}
    front = lifetimes(p.forward, fused=p.fused)
    back = lifetimes(p.backward, fused=p.fused, owned_inputs=names)
    base = front.live_bytes(skip=frozenset(movable))
    base += [b + held for b in back.live_bytes(skip=names - fixed)]
    seconds = [_step_seconds(p, n) for n in (*front_nodes, *back_nodes)]
    reads = last_reads(p.forward, fused=p.fused, ignore_output=True)
    born = {n.name: i for i, n in enumerate(front_nodes)}
    first_read = _first_reads(p.backward)
    activations = {}
    axes: dict[str, TokenAxis | None] = {}
    for name, node in movable.items():
        info: TokenInfo | None = node.meta.get(TOKENS)
        axis = info.axis if info is not None and info.axis.tokens > 1 else None
        axes[name] = axis
        must_leave = bool(limits.offload) and name in p.policies.offloaded
        chain = p.chains[name] if limits.recompute and not must_leave else None
        activations[name] = residency.Activation(
            name=name,
            bytes=nbytes(node),
            tokens=axis.tokens if axis is not None else 1,
            produced=born[name],
            last_forward=reads.get(name, born[name]),
            first_backward=steps + first_read.get(name, 0),
            last_backward=steps + max(back.ranges[name].end - 1, 0) if name in back.ranges else steps,
            recompute_seconds=None if chain is None else sum(p.seconds.get(n.name, 0.0) for n in chain),
            can_offload=bool(limits.offload),
            can_stay=not must_leave,
            recompute_whole=axis is not None and not _remade_by_rows(info, chain),
        )
    problem = residency.Problem(
        seconds=tuple(seconds),
        base_bytes=tuple(base),
        forward_steps=steps,
        activations=(),
        budget=limits.budget,
        host_budget=limits.host,
        d2h=p.profile.d2h,
        h2d=p.profile.h2d,
        slice_tokens=limits.slice_tokens or max(1, p.tokens.tokens // 64),
    )
    needs = {name: _needs(p.chains[name], movable) for name in movable}
    return View(tuple(movable), activations, needs, axes, problem)


def _step_seconds(p: Prepared, node: fx.Node) -> float:
    """Of a node of either graph. The backward's placeholders have names of what the forward computed, and are free."""
    return p.seconds.get(node.name, 0.0) if node.op == "call_function" else 0.0


def _remade_by_rows(info: TokenInfo | None, chain: tuple[fx.Node, ...] | None) -> bool:
    """Whether rows alone can be made again. A draw is a function of the place in the whole: a row of it costs all."""
    return info is not None and info.sliceable and not any(draws_from_seed(n) for n in chain or ())


def _movable(p: Prepared, results: set[fx.Node]) -> dict[str, fx.Node]:
    """Saved values that can leave: memo's own storage, dense, no other's, and large enough to be worth it."""
    storages = [storage_of(n) for n in p.saved]
    result_names = {n.name for n in results}
    return {
        n.name: n
        for n in p.saved
        if n.op != "placeholder"
        and (nbytes(n) >= SMALL or n.name in p.policies.offloaded)
        and n.name not in p.policies.saved
        and storage_of(n) is n
        and storages.count(n) == 1
        and n.name not in result_names
        and is_dense(n)
    }


def _first_reads(backward: fx.GraphModule) -> dict[str, int]:
    """The step of the first reader of each input of the backward, views followed."""
    first: dict[str, int] = {}
    for step, node in enumerate(backward.graph.nodes):
        if node.op == "call_function" and not is_view(node):
            for argument in node.all_input_nodes:
                first.setdefault(storage_of(argument).name, step)
    return first


def _needs(chain: tuple[fx.Node, ...] | None, movable: Mapping[str, fx.Node]) -> tuple[str, ...]:
    inside = set(chain or ())
    found = {a.name for n in inside for a in n.all_input_nodes if a not in inside and a.name in movable}
    return tuple(sorted(found))


def problems_of(view: View) -> list[residency.Problem]:
    """One problem for each set of anchors worth a try."""
    remakable = {name for name, a in view.activations.items() if a.recompute_seconds is not None}
    nbytes_of = {name: a.bytes for name, a in view.activations.items()}
    first = {name: a.first_backward for name, a in view.activations.items()}
    found = bottlenecks(view.order, view.needs, nbytes_of)
    sets = anchor_sets(found, view.order) if remakable else [frozenset(view.order)]
    problems = []
    for anchors in sets:
        needed = first_needed(view.order, first, view.needs, remakable - anchors)
        activations = tuple(
            replace(a, first_backward=needed[name], recompute_seconds=None if name in anchors else a.recompute_seconds)
            for name, a in view.activations.items()
        )
        problems.append(replace(view.problem, activations=activations))
    return problems


def least_peak(p: Prepared, limits: Limits) -> int:
    """The least bytes that the program knows how to hold. The arena is known only of plans that are made."""
    if not p.plannable:
        return p.unplanned_peak
    found = [p.unplanned_peak]
    for problem in problems_of(view_of(p, limits)):
        with suppress(SolverOutOfTime):
            found.append(int(residency.smallest_peak(problem, time_limit=limits.time_limit)))
    return min(found)


def best_of(view: View, limits: Limits) -> tuple[residency.Problem, residency.Decision, bool]:
    """The best answer over all sets of anchors, and whether it keeps the budget.

    Raises:
        SolverOutOfTime: no answer for any set within `limits.time_limit` seconds for each program.
    """
    problems = problems_of(view)
    unpulled = replace(view.problem, activations=tuple(view.activations.values())) if len(problems) > 1 else None

    @cache
    def peak(i: int) -> float:
        return residency.smallest_peak(problems[i], time_limit=limits.time_limit)

    def fastest(budget: int | None) -> tuple[residency.Problem, residency.Decision] | None:
        # Whether anything fits is asked first, and only when it comes to it: it is told much sooner than what is best.
        roomy = (replace(p, budget=budget) for i, p in enumerate(problems) if budget is None or peak(i) <= budget)
        return _fastest(replace(unpulled, budget=budget) if unpulled else None, roomy, limits.time_limit)

    if limits.objective == "time":
        found = fastest(view.problem.budget)
        if found is not None:
            return (*found, True)
    smallest = min(range(len(problems)), key=peak)
    try:
        found = fastest(int(residency.slightly_more(peak(smallest))))
    except SolverOutOfTime as late:
        log.warning("the smallest plan is not the fastest of such: %s", late)
        found = None
    if found is None:  # or slices are too coarse for so little room
        found = problems[smallest], residency.least(problems[smallest], time_limit=limits.time_limit)
    problem, decision = replace(found[0], budget=limits.budget), found[1]
    return problem, decision, limits.budget is None or decision.peak <= limits.budget


def _fastest(
    unpulled: residency.Problem | None, problems: Iterable[residency.Problem], time_limit: float
) -> tuple[residency.Problem, residency.Decision] | None:
    """The fastest answer; None where no problem has one.

    The search ends early where a set's answer is as good as if recomputation pulled nothing forward (`unpulled`): no
    set beats that.
    """
    bound: residency.Decision | SolverOutOfTime | None = None
    fitting: list[tuple[residency.Problem, residency.Decision]] = []
    late: list[SolverOutOfTime] = []
    for problem in problems:
        if bound is None and unpulled is not None:
            bound = _in_time(unpulled, time_limit)
        found = _in_time(problem, time_limit)
        if isinstance(found, SolverOutOfTime):
            late.append(found)
            if len(late) == PATIENCE and not fitting:
                break
        elif found is not None:
            fitting.append((problem, found))
            if isinstance(bound, residency.Decision) and found.seconds <= bound.seconds * (1 + CLOSE):
                break
    if late:
        if not fitting:
            raise late[0]
        log.warning("the solver ran out of time for some sets of anchors: a faster plan may exist (%s)", late[0])
    return min(fitting, key=lambda answer: answer[1].seconds, default=None)


def _in_time(problem: residency.Problem, time_limit: float) -> residency.Decision | SolverOutOfTime | None:
    try:
        return residency.decide(problem, time_limit=time_limit)
    except SolverOutOfTime as late:
        return late


@dataclass(frozen=True)
class _Choice:
    """Homes, and the graphs that they make."""

    problem: residency.Problem
    decision: residency.Decision
    homes: dict[str, Homes]
    ahead: bool
    sliced: Sliced


def _within_host(p: Prepared, limits: Limits) -> _Choice:
    """Homes whose slices fit in host memory as they lie there, whole and aligned: the program counts bare bytes.

    Raises:
        HostBudgetExceeded: everything is to be offloaded, and does not fit.
    """
    choice, host = _chosen(p, limits, limits.host), limits.host
    for rounds_left in reversed(range(HOST_ROUNDS)):
        excess = choice.sliced.host_bytes - limits.host
        if excess <= 0:
            return choice
        if limits.offload == "all":
            raise HostBudgetExceeded(choice.sliced.host_bytes, 0, limits.host)
        host = max(0, host - 2 * excess) if rounds_left else 0  # without offloading at last
        choice = _chosen(p, limits, host)
    return choice


def _chosen(p: Prepared, limits: Limits, host: int) -> _Choice:
    """Homes for `host` bytes of host memory."""
    view = view_of(p, replace(limits, host=host))
    everything = limits.offload == "all"
    if everything:
        (problem, *_), fits = problems_of(view), True
        decision = residency.all_offloaded(problem, time_limit=limits.time_limit)
    else:
        problem, decision, fits = best_of(view, limits)
    homes = {
        a.name: Homes(a.tokens, r.kept, r.offloaded, r.recomputed, view.axes[a.name])
        for a in problem.activations
        for r in [decision.residency[a.name]]
    }
    ahead = fits and (everything or limits.objective == "time")
    return _Choice(problem, decision, homes, ahead, carry_out(p, homes, ahead=ahead, host_budget=limits.host))


def decide(p: Prepared, limits: Limits, *, name: str, backend: str) -> Decided:
    """Choose homes within `limits` and build the graphs that carry them out.

    Where no plan fits the budget, the smallest is returned: only the arena tells whether it really is too large.

    Raises:
        HostBudgetExceeded: everything is to be offloaded, and does not fit in host memory.
    """
    started = time.perf_counter()
    everything = limits.offload == "all"
    if not p.plannable:
        return replace(_unplanned(p, limits, name, backend, started), obstacles=(DRAWN_AGAIN, *_in_the_way(p)))
    roomy = limits.budget is None or limits.budget >= p.unplanned_peak
    if not everything and limits.objective == "time" and roomy and not p.policies.offloaded:
        return _unplanned(p, limits, name, backend, started)
    choice = _within_host(p, limits)
    problem, decision, homes, ahead, sliced = choice.problem, choice.decision, choice.homes, choice.ahead, choice.sliced
    peak = graph_peak(sliced.forward, sliced.backward, sliced.saved, p.num_forward_outputs, p.fused)
    plan = replace(
        _blank_plan(p, limits, name, backend),
        predicted_peak=peak,
        predicted_seconds=decision.seconds,
        host_bytes=sliced.host_bytes,
        recomputed_flops=_recomputed_flops(p, homes),
        solver="none: everything is offloaded" if everything else "highs",
        seconds=time.perf_counter() - started,
        binding=decision.binding,
        prices=dict(decision.prices),
        activations=_activation_plans(p, homes, limits),
    )
    plan = replace(plan, workspaces=workspaces_in(sliced.forward, sliced.backward))
    in_the_way = obstacles(sliced.forward, sliced.backward, frozenset(sliced.saved), _makers(p), p.fused)
    return Decided(plan, sliced.forward, sliced.backward, sliced.saved, homes, in_the_way, limits, ahead, problem)


def carry_out(
    p: Prepared, homes: Mapping[str, Homes], *, ahead: bool, host_budget: int, watch: Watch = unwatched
) -> Sliced:
    """Build the graphs: what is recomputed whole is not saved, the rest gets its slices and transfers.

    With `ahead`, transfers overlap with computation; without, nothing waits in memory for a link. `watch` is shown both
    graphs after each pass, with the pass's name; the next pass rewrites them in place.
    """
    decision = Decision(
        joint=p.joint,
        saved=p.saved,
        homes=homes,
        host_budget=host_budget,
        overlap=ahead,
        seconds=partial(_step_seconds, p),
        profile=p.profile,
        fused=p.fused,
        workspaces=p.workspaces.annotate,
    )
    return act(decision, p.unplanned, watch)


def _recomputed_flops(p: Prepared, homes: Mapping[str, Homes]) -> int:
    total = 0.0
    for key, h in homes.items():
        chain = p.chains[key]
        if h.recomputed and chain is not None:
            total += sum(p.flops.get(n.name, 0) for n in chain) * h.recomputed / h.tokens
    return int(total)


def _in_the_way(p: Prepared) -> tuple[str, ...]:
    split = p.unplanned
    return obstacles(split.forward, split.backward, frozenset(split.saved), _makers(p), p.fused)


def _makers(p: Prepared) -> dict[str, fx.Node]:
    return {n.name: n for n in p.joint.graph.nodes}


def _blank_plan(p: Prepared, limits: Limits, name: str, backend: str) -> Plan:
    forward = {n.name for n in p.forward.graph.nodes}
    return Plan(
        name=name,
        backend=backend,
        budget=limits.budget,
        predicted_peak=p.unplanned_peak,
        least_peak=0,
        unplanned_peak=p.unplanned_peak,
        predicted_seconds=0.0,
        host_bytes=0,
        forward_flops=p.forward_flops,
        recomputed_flops=0,
        solver="none: everything fits",
        seconds=0.0,
        binding="nothing",
        token_axis=str(p.tokens.axis),
        activations=(),
        stops=tuple(Stop(s.node, s.op, s.source, s.reason) for s in p.tokens.stops if s.node in forward),
    )


def _unplanned(p: Prepared, limits: Limits, name: str, backend: str, started: float) -> Decided:
    split = p.unplanned
    nodes = {n.name: n for n in split.forward.graph.nodes}
    scheduled = [*split.forward.graph.nodes, *split.backward.graph.nodes]
    kept = [nodes[n] for n in split.saved if n in nodes and nodes[n].op != "placeholder"]
    whole = Homes(1, 1, 0, 0, None)
    plan = replace(
        _blank_plan(p, limits, name, backend),
        predicted_seconds=sum(_step_seconds(p, n) for n in scheduled),
        seconds=time.perf_counter() - started,
        activations=tuple(_activation_plan(n, whole, "kept: the budget allows it") for n in kept if nbytes(n)),
        workspaces=workspaces_in(split.forward, split.backward),
    )
    return Decided(plan, split.forward, split.backward, split.saved, limits=limits)


def _activation_plans(p: Prepared, homes: Mapping[str, Homes], limits: Limits) -> tuple[ActivationPlan, ...]:
    plans = []
    for node in p.saved:
        if node.op == "placeholder" or not nbytes(node):
            continue
        home = homes.get(node.name)
        if home is not None:
            plans.append(_activation_plan(node, home, _reason(p, node, home, limits)))
            continue
        small = nbytes(node) < SMALL
        if node.name in p.policies.saved:
            reason = "kept: a policy of the user's checkpoints says so"
            plans.append(_activation_plan(node, Homes(1, 1, 0, 0, None), reason))
            continue
        reason = f"kept: below {SMALL} bytes" if small else "kept: its storage is an output's or another value's"
        plans.append(_activation_plan(node, Homes(1, 1, 0, 0, None), reason))
    return tuple(plans)


def _reason(p: Prepared, node: fx.Node, home: Homes, limits: Limits) -> str:
    if node.name in p.policies.offloaded:
        return "offloaded: a policy of the user's checkpoints says so"
    if home.axis is None:
        return "whole: no token axis reaches it"
    if p.chains[node.name] is None and limits.recompute:
        return "sliced; not recomputed: its last bits decide something, or it must not run twice"
    info: TokenInfo = node.meta[TOKENS]
    return "sliced" if info.sliceable else f"sliced; recomputed whole or not at all: {info.reason}"


def _activation_plan(node: fx.Node, home: Homes, reason: str) -> ActivationPlan:
    value = node.meta["val"]
    return ActivationPlan(
        node.name,
        tuple(int(s) for s in value.shape),
        str(value.dtype).removeprefix("torch."),
        nbytes(node),
        source_line(node),
        home.tokens,
        home.kept,
        home.offloaded,
        home.recomputed,
        reason,
        node.meta[LAYER].index if LAYER in node.meta else None,
    )
