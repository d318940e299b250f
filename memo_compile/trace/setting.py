"""What both backends share: from options and a joint graph to limits, a name, and a recorded plan."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from memo_compile.errors import CompiledAutograd, GradientsInside, ReserveTooLarge, UserStreams
from memo_compile.hardware.device_memory import Allocator, allocator_here, usable
from memo_compile.hardware.host_memory import free_host_memory
from memo_compile.hardware.profiles import DeviceProfile, resolve
from memo_compile.logs import MIB, announce, logger
from memo_compile.options import Options
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.fx.facts import nbytes, source_line, tensors
from memo_compile.passes.fx.ranges import NoRange
from memo_compile.passes.fx.sizes import elements
from memo_compile.passes.fx.unusual import on_streams, unusual_ops
from memo_compile.planning.decide import Decided
from memo_compile.planning.problem import Limits
from memo_compile.progress import Progress
from memo_compile.registry import registry
from memo_compile.runtime.first_step import FirstStep
from memo_compile.runtime.ops import pool
from memo_compile.runtime.outstanding import Kept, kept_by, ledger
from memo_compile.schema import Plan
from memo_compile.trace.captured import under_compiled_autograd
from memo_compile.trace.frames import check_limit, frame_name, warn_at_limit
from memo_compile.trace.observer import Observe, nobody
from memo_compile.trace.siblings import expected_calls, whole_model
from memo_compile.trace.to_come import engine_bytes, trainable_elements

log = logger("memo_compile")

HOST_SHARE = 0.5  # of the free host memory, for host_budget="auto": the rest is for data loaders and the system
MARGIN = 0.05  # of the usable device memory, which "auto" leaves alone: libraries' workspaces, other programs
LARGE_RESULT = 0.2  # of a plan's peak: a result that is worth a word
MATTERS = 2**20  # bytes: what a graph that holds less cannot give is not worth a warning, nor a refusal
HOST_DIGITS, DEVICE_DIGITS = 3, 6  # binary ones, to which "auto" is rounded down so that a restart finds the same
BYTES_PER_TRAINABLE = 8  # a gradient and two moments, in part there already: what "auto" leaves room for


@dataclass(frozen=True)
class Given:
    """The bytes that a budget is found to be: None for no limit, or for a ratio.

    `beside` is what others hold of it, `on_host` what they hold of the host's. `allocator` says by what rules torch
    hands out the device's.
    """

    budget: int | None
    beside: int = 0
    on_host: int = 0
    allocator: Allocator = Allocator.UNKNOWN


@dataclass(frozen=True)
class Told:
    """What a user is told of a plan, whenever it is made or found: whether it `plans` anything, ops that are `unusual`.

    `streams` is the line of an op on a stream of the user's. `over` is a budget that it exceeds, with the peak and what
    is in the way; None where it keeps it.
    """

    plans: bool
    unusual: tuple[str, ...] = ()
    streams: str | None = None
    over: tuple[int, int, str] | None = None


@dataclass(frozen=True)
class Setting:
    """The surroundings of one graph's compilation. `frame` is the user's function, in words;
    `calls` of its graph wait for their backward at once.

    `engine` are bytes that an engine around the model takes for itself.
    `given` are the budget's bytes where they are settled already; else they are found when they are asked for.
    `first_step` is told what comes of it, and measures; `observe` makes the observer of the graph. `progress`
    shows what takes long.
    """

    name: str
    options: Options
    device: torch.device
    profile: DeviceProfile
    host: int
    trainable: int
    engine: int = 0
    frame: str = ""
    calls: int = 1
    first_step: FirstStep = field(default_factory=lambda: FirstStep(""))
    observe: Observe = nobody
    given: Given | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def family(self) -> str:
        """All graphs of one function: it may be compiled for a first block whose input wants no gradient."""
        return self.frame or self.name

    @property
    def allocator(self) -> Allocator:
        """The rules of torch's allocator on the device, where they are known and there is one."""
        return self.given.allocator if self.given is not None else Allocator.UNKNOWN

    @property
    def counts_reserved(self) -> bool:
        """Whether the budget is for all that is taken of the device, and not for what is allocated of that."""
        return self.options.memory_budget == "auto" and self.allocator is not Allocator.UNKNOWN

    @property
    def asks(self) -> bool:
        """Whether anything may have to be planned: without a budget nothing has."""
        return asks(self.options, self.device)

    def keeps(self, forward: fx.GraphModule, num_forward_outputs: int) -> Kept | None:
        """What a call of a forward keeps, where something was to be planned; else nothing is counted."""
        return kept_by(forward, num_forward_outputs, self.name, self.family, self.calls) if self.asks else None

    def not_planned(self, graph: fx.GraphModule, *, gradients_inside: bool, fused: bool) -> None:
        """Call this for a graph that AOTAutograd gives no backward to.

        Raises:
            GradientsInside: it takes gradients within itself, and holds more than a budget allows.
        """
        if not self.asks:
            return
        warn_at_limit()
        if gradients_inside:
            _refuse(self.options, max(lifetimes(graph, fused=fused).live_bytes(), default=0))


def asks(options: Options, device: torch.device) -> bool:
    """Whether a graph on a device may have to be planned."""
    return options.offload == "all" or options.memory_budget != "auto" or device.type == "cuda"


def device_of(inputs: Sequence[Any]) -> torch.device:
    """The device that a graph is planned for: the first of its inputs that is none of the CPU."""
    device = next((v.device for v in inputs if isinstance(v, torch.Tensor) and v.device.type != "cpu"), None)
    return device or torch.device("cpu")


def setting_for(options: Options, inputs: Sequence[Any], observe: Observe = nobody) -> Setting:
    """Resolve what does not depend on the graph: device, profile, host budget, a name.

    `trainable` counts the elements of the parameters that want gradients: those of the model that is trained, of which
    the graph may be one block, where a budget is taken from what the device has free.
    """
    device = device_of(inputs)
    trainable = sum(elements(v.shape) for v in inputs if isinstance(v, torch.Tensor) and v.requires_grad and v.is_leaf)
    model = whole_model() if options.memory_budget == "auto" and device.type == "cuda" else None
    profile, host = resolve(options.hardware, device.type), _host_budget(options)
    host = host if isinstance(options.host_budget, int) else rounded_down(host, HOST_DIGITS)
    name, promised = registry().next_name(), options.memory_budget not in ("auto", "min") or device.type == "cuda"
    step = FirstStep(name, device.type, asks=promised)
    frame = frame_name()
    calls = options.calls if isinstance(options.calls, int) else expected_calls()
    calls = max(1, calls - ledger().of_family(frame))
    return Setting(
        name=name,
        options=options,
        device=device,
        profile=profile,
        host=host,
        trainable=trainable if model is None else max(trainable, trainable_elements(model)),
        engine=0 if model is None else engine_bytes(model),
        frame=frame,
        calls=calls,
        first_step=step,
        observe=observe,
    )


def _host_budget(options: Options) -> int:
    if isinstance(options.host_budget, int):
        return options.host_budget
    return pool().held_bytes + int(free_host_memory() * HOST_SHARE) // local_ranks()


def rounded_down(size: int, digits: int) -> int:
    """The next size below that has so many binary digits before its zeros.

    >>> rounded_down(1000, 3)
    896
    """
    zeros = max(0, size.bit_length() - digits)
    return size >> zeros << zeros


def local_ranks() -> int:
    """Processes that share this machine's memory, as torchrun tells: each has its share of what is free."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdecimal() else 1


def limits_for(setting: Setting, unplanned_peak: int) -> Limits:
    """The limits in bytes. `unplanned_peak` is what a ratio is of.

    A number of bytes is for all that is held at once: what other graphs hold now, for a backward to come, is taken off.
    """
    o = setting.options
    given = setting.given or _given(setting)
    return Limits(
        budget=int(o.memory_budget * unplanned_peak) if isinstance(o.memory_budget, float) else given.budget,
        host=max(0, setting.host - given.on_host),
        offload=o.offload,
        recompute=o.recompute,
        slice_tokens=o.token_slice if isinstance(o.token_slice, int) else 0,
        time_limit=o.solver_time_limit,
        objective="memory" if o.memory_budget == "min" else "time",
        beside=given.beside,
        calls=setting.calls,
        host_beside=min(given.on_host, setting.host),
        tiles=o.tiles,
        accumulate=o.accumulate,
        promised=not isinstance(o.memory_budget, float),
    )


def with_budget_now(setting: Setting) -> Setting:
    """The setting with the bytes of its budget as they are now."""
    return replace(setting, given=_given(setting))


def _given(setting: Setting) -> Given:
    allocator = allocator_here() if setting.device.type == "cuda" else Allocator.UNKNOWN
    return replace(_budget_now(setting, allocator), allocator=allocator)


def _budget_now(setting: Setting, allocator: Allocator) -> Given:
    o, on_host = setting.options, ledger().on_host(beside=setting.name, family=setting.family)
    if isinstance(o.memory_budget, int):
        held = ledger().held(setting.device, beside=setting.name, family=setting.family)
        beside = min(held, o.memory_budget - 1)
        return Given(o.memory_budget - beside, beside, on_host)
    if o.memory_budget == "auto" and setting.device.type == "cuda":
        found = auto_budget(usable(setting.device, allocator), o.reserve, setting.trainable, setting.engine)
        return Given(rounded_down(found, DEVICE_DIGITS), on_host=on_host)
    return Given(None, on_host=on_host)


def _say_over(setting: Setting, budget: int, peak: int, largest: str) -> None:
    """Say that the plan that holds least was taken for a share that the graph cannot give."""
    log.log(
        logging.WARNING if peak >= MATTERS else logging.DEBUG,
        "%s: memory_budget=%s asks this graph for %.2f MiB, and the least that any plan holds is %.2f MiB, which is "
        "taken; in the way: %s. For a limit on the sum of all graphs, write it in bytes.",
        *(setting.frame or setting.name, setting.options.memory_budget, budget / MIB, peak / MIB, largest),
    )


def told_of(limits: Limits, decided: Decided, peak: int) -> Told:
    """What the user is to be told of what was decided."""
    largest = next(iter(decided.peak_tensors), "nothing that can be named")
    node = on_streams(decided.forward)
    return Told(
        plans=any(h.kept < h.tokens for h in decided.residency.values()),
        unusual=tuple(unusual_ops(decided.forward)),
        streams=source_line(node) if node is not None else None,
        over=(limits.budget, peak, largest) if limits.budget is not None and peak > limits.budget else None,
    )


def check_planned(setting: Setting, told: Told) -> None:
    """Call this for what was decided: may the frame be compiled once more, and does the plan give what is asked?

    Raises:
        CompiledAutograd: it would take the planned backward apart.
        RecompileLimit: Dynamo would run the frame eagerly from now on.
        UserStreams: copies and reused bytes would be ordered for one stream.
    """
    if told.plans:
        if under_compiled_autograd():
            raise CompiledAutograd
        if told.streams is not None:
            raise UserStreams(told.streams)
        check_limit()
    elif setting.asks:
        warn_at_limit()
    found = told.unusual
    if found and setting.options.verify is not True:
        log.info(
            '%s: calls %s; options={"verify": True} compares its first step with the unplanned graph',
            *(setting.frame or setting.name, ", ".join(found[:3]) + (" and others" if len(found) > 3 else "")),
        )
    if told.over is not None:
        _say_over(setting, *told.over)


def tell_of_results(setting: Setting, forward: fx.GraphModule, num_forward_outputs: int, peak: int) -> None:
    """Warn of what is returned beside a loss, where it is a large part of the peak: no plan can make it smaller."""
    (output,) = forward.graph.find_nodes(op="output")
    results = [n for n in output.args[0][:num_forward_outputs] if isinstance(n, fx.Node) and n.op != "placeholder"]
    large = [n for n in results if nbytes(n) >= max(MATTERS, LARGE_RESULT * peak)]
    if setting.asks and large and any(v.dim() == 0 for n in results for v in tensors(n)):
        log.warning(
            "%s returns %s beside the loss: %.2f MiB of the %.2f MiB of its plan, held whole until nobody has it. "
            "Where training does not need it, memo_compile.loss_only(model) leaves it out (%s)",
            *(setting.frame or setting.name, large[0].name, nbytes(large[0]) / MIB, peak / MIB, source_line(large[0])),
        )


def check_one_plan(joint: fx.GraphModule, setting: Setting) -> None:
    """Call this before a graph is planned for a range of lengths.

    Raises:
        NoRange: `verify="poison"` is for one length.
    """
    if setting.options.verify == "poison":
        raise NoRange("poison is for one length")


def _refuse(o: Options, peak: int) -> None:
    bytes_asked = isinstance(o.memory_budget, int)
    allowed = o.memory_budget if isinstance(o.memory_budget, int) else MATTERS
    if peak > allowed and (bytes_asked or o.offload == "all" or o.memory_budget not in ("auto", 1.0)):
        asked = f"offload={o.offload!r}" if o.offload == "all" else f"memory_budget={o.memory_budget!r}"
        raise GradientsInside(peak, asked)


def auto_budget(free: int, reserve: int | None, trainable: int, engine: int = 0) -> int:
    """The bytes of `memory_budget="auto"`: what is free on the device, less a margin and what is to come.

    That is `reserve` where it is given, else gradients and moments of `trainable` elements and an engine's bytes.

    Raises:
        ReserveTooLarge: nothing is left.
    """
    kept = BYTES_PER_TRAINABLE * trainable + engine if reserve is None else reserve
    usable = int(free * (1 - MARGIN))
    if kept >= usable:
        raise ReserveTooLarge(kept, free, usable)
    return usable - kept


def record(plan: Plan) -> None:
    """Keep a plan for `plans()`, and say what it is."""
    registry().add(plan)
    announce(plan)
