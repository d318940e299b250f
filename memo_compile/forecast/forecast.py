"""Answers, for a model on devices that need not be there: what would it hold, what goes where, how long is a step?

One rank's graph is traced on fake tensors, its layers are repeated where the model has more than were traced, and the
linear program decides. Nothing is allocated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from memo_compile.errors import InvalidOption, ModelTooLarge
from memo_compile.forecast.arena import OfflineArena, offline_arena
from memo_compile.forecast.parallel import Layout, ModelState, model_state
from memo_compile.forecast.presets import build, preset
from memo_compile.forecast.repeat_layers import Long, lengthened
from memo_compile.forecast.rows import LargeTensor, ResidencyRow, largest_tensors, maker_of, residency_rows
from memo_compile.forecast.strategies import STRATEGIES as BASELINES
from memo_compile.forecast.strategies import Stack, alone
from memo_compile.hardware.profiles import DeviceProfile, resolve
from memo_compile.passes.analysis.costs import Timer, account, is_attention
from memo_compile.passes.fx.facts import tensors
from memo_compile.passes.transforms.sequence_shards import Part
from memo_compile.planning.anchors import anchor_sets, bottlenecks
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import Limits
from memo_compile.planning.residency import Decision, Problem, memory_profile
from memo_compile.planning.search import best_of
from memo_compile.planning.tiling import TILES, tiled
from memo_compile.schema import Binding
from memo_compile.trace.offline import trace

MARGIN = 0.05  # of the device's memory: the context, libraries' workspaces, fragmentation
TRACED = 4  # layers of a preset; the others are like the second

# Which homes are open: (offload, recompute).
STRATEGIES: Mapping[str, tuple[bool, bool]] = {
    "memo": (True, True),
    "keep": (False, False),
    "offload": (True, False),
    "recompute": (False, True),
}

# What one could do instead (`forecast/strategies.py`), as it plays: "full-recompute" and the like.
NAMED = tuple(name.replace(" ", "-") for name in BASELINES if name != "memo")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is asked for. Bytes; `budget` is None for the device's memory, and caps activations and transients."""

    name: str
    tokens: int
    layout: Layout
    hardware: str
    host_memory: int | None = None
    budget: int | None = None
    strategy: str = "memo"


@dataclass(frozen=True)
class Forecast:
    """The answer, for one rank. Bytes and seconds; `residency` by layer class, `tensors` by tensor in the largest one.

    Where nothing fits, `fits` is False, and the rest is of the plan that holds least. `tiles` is in how many the widest
    regions run, 1 for none. `peak` counts activations,
    transients and outputs, within `budget`; model state lies beside it. `arena` holds the same, placed. `mfu` is of the
    model's own FLOPs, attention counted causally, nothing recomputed; `prices` are the seconds that one more
    GiB or GB/s would save.
    """

    asked: Asked
    profile: str
    fits: bool
    tiles: int
    layers: int
    parameters: int
    state: ModelState
    budget: int
    host_budget: int
    peak: int
    transients: int
    saved: int
    kept: int
    offloaded: int
    recomputed: int
    step_seconds: float
    compute_seconds: float
    recompute_seconds: float
    stall_seconds: float
    flops: float
    mfu: float
    tokens_per_second: float
    binding: Binding
    prices: Mapping[Binding, float]
    residency: tuple[ResidencyRow, ...]
    tensors: tuple[ResidencyRow, ...]
    largest: tuple[LargeTensor, ...]
    seconds_by_op: Mapping[str, float]
    arena: OfflineArena
    planning_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        values = asdict(self)
        return {"homes" if name == "residency" else name: value for name, value in values.items()}


def forecast_preset(
    asked: Asked, *, traced: int = TRACED, say: Say = lambda _: None, timer: Timer | None = None
) -> Forecast:
    """What training the preset `asked.name` would take.

    Args:
        traced: layers to trace; the model's own number is planned.
        say: told in a few words what is being done.
        timer: seconds of kernels measured on a device (`KernelTimer`).

    Raises:
        InvalidOption: no such preset, strategy or hardware, or sizes that do not go together.
        ModelTooLarge: the model's state alone does not fit.
    """
    started = time.perf_counter()
    _check(asked)
    found = preset(asked.name)
    traced = min(found.layers, max(TRACED, traced))
    say(f"building {traced} of {found.layers} layers of {asked.name}")
    rank = build(asked.name, asked.tokens, ranks=asked.layout.tp, layers=traced)
    elements = sum(p.numel() for p in rank.model.parameters())
    layer = sum(p.numel() for p in rank.model.blocks[0].parameters())
    elements += layer * (found.layers - traced)
    say(f"tracing {traced} layers at {asked.tokens:,} tokens")
    p = _traced(rank.model, rank.args, rank.kwargs, asked, timer)
    return _answer(asked, p, found.layers, elements, layer, started, say)


def forecast_model(
    asked: Asked,
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    say: Say = lambda _: None,
    timer: Timer | None = None,
) -> Forecast:
    """What training a model of fake tensors would take, all its layers traced.

    Raises:
        MemoError: it cannot be traced into one graph, or its state alone does not fit.
    """
    started = time.perf_counter()
    _check(asked)
    elements = sum(p.numel() for p in getattr(model, "parameters", list)())
    say(f"tracing {asked.name}: all its layers")
    p = _traced(model, tuple(args), kwargs, asked, timer)
    asked = replace(asked, tokens=p.tokens.tokens)
    return _answer(asked, p, 0, elements, elements, started, say)


def _check(asked: Asked) -> None:
    if asked.strategy not in STRATEGIES and asked.strategy not in NAMED:
        raise InvalidOption("--strategy", asked.strategy, f"one of {', '.join((*STRATEGIES, *NAMED))}")
    resolve(asked.hardware)


def _traced(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], asked: Asked, timer: Timer | None
) -> Prepared:
    part = Part("", asked.layout.cp) if asked.layout.cp > 1 else None
    return trace(model, args, kwargs, {"hardware": asked.hardware}, timer=timer, part=part)[0]


def _answer(
    asked: Asked, p: Prepared, layers: int, elements: int, largest_layer: int, started: float, say: Say
) -> Forecast:
    profile, where = p.profile, asked.layout
    state = model_state(elements, min(elements, largest_layer), where)
    budget = asked.budget if asked.budget is not None else int(profile.memory * (1 - MARGIN)) - state.total
    host = where.host_share(asked.host_memory if asked.host_memory is not None else profile.host_memory)
    if budget <= 0:
        raise ModelTooLarge(int(profile.memory * (1 - MARGIN)), state.total, _state_in_words(state))
    offload, recompute = STRATEGIES.get(asked.strategy, (True, True))
    limits = Limits(budget, host, offload=offload, recompute=recompute)
    found = _fitting(asked, p, layers, limits, say)
    say("placing")
    arena = offline_arena(found.p, found.long, found.problem, found.decision.residency)
    return _forecast(asked, found, state, elements, arena, time.perf_counter() - started)


def _fitting(asked: Asked, p: Prepared, layers: int, limits: Limits, say: Say) -> _Found:
    """The plan with the widest regions in as few tiles as the budget needs, as the compiler chooses them.

    Where none fits, that which holds least.
    """
    say("repeating layers")
    whole = lengthened(p, limits, layers)
    say(f"deciding on {len(whole.view.order)} activations")
    found = [_Found(p, whole, *_decision_for(asked, p, whole, limits))]
    for tiles in TILES if asked.strategy in STRATEGIES else ():
        if found[-1].fits:
            break
        cut = tiled(p, tiles)
        if cut is not None:
            say(f"deciding on it in {tiles} tiles")
            # What a tile makes again is none of the model's own FLOPs.
            long = replace(lengthened(cut, limits, layers), flops=whole.flops, forward_flops=whole.forward_flops)
            found.append(_Found(cut, long, *_decision_for(asked, cut, long, limits), tiles))
    return found[-1] if found[-1].fits else min(found, key=lambda f: f.peak)


@dataclass(frozen=True)
class _Found:
    """A plan for `p` with its layers repeated, and whether it keeps the budget."""

    p: Prepared
    long: Long
    problem: Problem
    decision: Decision
    fits: bool
    tiles: int = 1

    @property
    def peak(self) -> int:
        return max(self.decision.peak, max(memory_profile(self.problem, self.decision.residency)))


def _decision_for(asked: Asked, p: Prepared, long: Long, limits: Limits) -> tuple[Problem, Decision, bool]:
    """The linear program's answer, or how a named strategy plays."""
    if asked.strategy in STRATEGIES:
        return best_of(long.view, limits)
    return alone(_stack(p, long), asked.strategy.replace("-", " "))


def _stack(p: Prepared, long: Long) -> Stack:
    """The same training step, as strategies see it: which activations are layers' inputs, which are of attention."""
    view = long.view
    nodes = {n.name: n for n in p.saved}
    layer = {name: -1 if (at := long.layer[name]) is None else at for name in view.order}
    inputs = {s for name in view.order if layer[name] >= 0 for s in view.needs[name] if layer[s] != layer[name]}
    attention = {name for name in view.order if is_attention(maker_of(nodes[long.template[name]]))}
    sizes = {name: a.bytes for name, a in view.activations.items()}
    anchors = anchor_sets(bottlenecks(view.order, view.needs, sizes), view.order)
    problem = replace(view.problem, activations=tuple(view.activations[name] for name in view.order))
    return Stack(
        problem=problem,
        needs=view.needs,
        layer=layer,
        inputs=frozenset(inputs),
        attention=frozenset(attention),
        anchors=tuple(anchors),
    )


def _forecast(
    asked: Asked, found: _Found, state: ModelState, elements: int, arena: OfflineArena, planning_seconds: float
) -> Forecast:
    p, long, problem, decision = found.p, found.long, found.problem, found.decision
    residency, tensors_of_class = residency_rows(p, long, problem, decision)
    return Forecast(
        asked=asked,
        profile=p.profile.name,
        fits=found.fits,
        tiles=found.tiles,
        layers=len(long.classes),
        parameters=elements * asked.layout.tp,
        state=state,
        budget=problem.budget or 0,
        host_budget=problem.host_budget,
        peak=found.peak,
        transients=max(problem.base_bytes),
        saved=sum(h.bytes for h in residency),
        kept=sum(h.kept for h in residency),
        offloaded=sum(h.offloaded for h in residency),
        recomputed=sum(h.recomputed for h in residency),
        step_seconds=decision.seconds,
        compute_seconds=sum(problem.seconds),
        recompute_seconds=decision.recompute_seconds,
        stall_seconds=decision.stall_seconds,
        flops=long.flops,
        mfu=long.flops / (decision.seconds * _peak_flops(p.profile, p)),
        tokens_per_second=asked.tokens * asked.layout.replicas / decision.seconds,
        binding=_binds(problem, decision),
        prices=dict(decision.prices),
        residency=residency,
        tensors=tensors_of_class,
        largest=largest_tensors(p),
        seconds_by_op={op: c.seconds for op, c in account(p.joint, p.costs).items() if c.seconds},
        arena=arena,
        planning_seconds=planning_seconds,
    )


def _binds(problem: Problem, decision: Decision) -> Binding:
    """What limits the plan: what the program prices; where whole tensors leave it without prices, what is used up."""
    if decision.binding is not Binding.NOTHING or decision.recompute_seconds + decision.stall_seconds == 0:
        return decision.binding
    offloaded = sum(a.bytes * decision.residency[a.name].offloaded / a.tokens for a in problem.activations)
    return Binding.HOST_MEMORY if offloaded > 0.99 * problem.host_budget else Binding.DEVICE_MEMORY


def _peak_flops(profile: DeviceProfile, p: Prepared) -> float:
    """Peak FLOP/s in the type in which most of the graph's FLOPs are done."""
    by_type: dict[str, int] = {}
    for node in p.joint.graph.nodes:
        if p.flops.get(node.name) and tensors(node):
            name = str(tensors(node)[0].dtype).removeprefix("torch.")
            by_type[name] = by_type.get(name, 0) + p.flops[node.name]
    return profile.flops(max(by_type, key=lambda name: by_type[name], default="float32"))


def _state_in_words(state: ModelState) -> tuple[str, ...]:
    return tuple(f"{name}: {size:,} bytes" for name, size in asdict(state).items() if size)
