"""The two torch.compile backends, found through the entry-point group `torch_dynamo_backends`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from memo_compile.errors import CompiledAutograd, SizeUnknown
from memo_compile.logs import logger
from memo_compile.options import Options
from memo_compile.passes.fx.sizes import is_symbolic, sizes_of
from memo_compile.runtime.planning_again import twin
from memo_compile.runtime.verification import verified
from memo_compile.trace.buckets import keep_whole, unwrapped
from memo_compile.trace.captured import holds_planned_backward
from memo_compile.trace.frames import note_graph_break, note_shapes
from memo_compile.trace.scales import keep_symbolic
from memo_compile.versions import check_torch

if TYPE_CHECKING:
    from memo_compile.runtime.first_step import FirstStep
    from memo_compile.trace.setting import Setting

log = logger("memo_compile")

Compiled = Callable[..., Any]


def memo(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """Plan a graph, place its buffers in an arena, and compile it with Inductor.

    Args:
        gm, inputs: what Dynamo gives to a backend.
        options: see `memo_compile.Options`.
        mode: Inductor's mode.

    Raises:
        UnknownOption, InvalidOption: a mistake in `options`.
        BudgetTooSmall: no plan fits in `memory_budget`.
        SizeUnknown: a size depends on data.
        RecompileLimit: the frame was compiled for as many shapes as Dynamo allows.
    """
    # What a backend needs is loaded when it is used, not when torch lists the backends.
    from memo_compile.codegen.compiler import compile_planned
    from memo_compile.codegen.unplanned import with_inductor

    parsed = _start(gm, options, mode, inputs)
    return _compiled(gm, inputs, parsed, compile_planned, with_inductor, "inductor")


def memo_eager(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """Plan a graph with the same passes, and run it op by op: for debugging, as `aot_eager` is to `inductor`.

    Arguments and errors are those of `memo`; there is no arena, and every op allocates for itself.
    """
    # As above.
    from memo_compile.codegen.interpreter import run_planned
    from memo_compile.codegen.unplanned import op_by_op

    parsed = _start(gm, options, mode, inputs)
    return _compiled(gm, inputs, parsed, run_planned, op_by_op, "aot_eager")


def _start(gm: fx.GraphModule, options: Mapping[str, Any] | None, mode: str | None, inputs: Sequence[Any]) -> Options:
    check_torch()
    parsed = Options.parse(options, mode=mode)
    if any(isinstance(value, torch.Tensor) and value.is_nested for value in inputs):
        raise SizeUnknown("a nested tensor among the inputs")
    note_graph_break()
    note_shapes(inputs)
    from memo_compile.runtime.ops import register  # loaded when a backend is used, not when torch lists them

    register()
    if holds_planned_backward(gm):
        raise CompiledAutograd
    return parsed


def _compiled(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    planned: Callable[[fx.GraphModule, Sequence[Any], Setting], Compiled],
    unplanned: Callable[[fx.GraphModule, Sequence[Any], Options], Compiled],
    reference: str,
) -> Compiled:
    # Loaded when a backend is used, not when torch lists them.
    from memo_compile.passes.fx.ranges import NoRange, NothingPlanned
    from memo_compile.report.dumps import Dump
    from memo_compile.runtime.kept_budgets import kept
    from memo_compile.runtime.more_calls import for_all_calls
    from memo_compile.runtime.range_calls import within_budgets
    from memo_compile.runtime.unplanned_calls import counted
    from memo_compile.trace.setting import setting_for

    inputs = list(inputs)
    setting = setting_for(options, inputs, Dump.open)
    if not setting.asks and any(is_symbolic(size) for size in sizes_of(inputs)):
        return unplanned(gm, inputs, options)

    def of_a_range(compiled: Compiled) -> Compiled:
        budgets: dict[str, Any] = {"budget": options.memory_budget, "host": options.host_budget}
        return within_budgets(compiled, setting.name, setting.family, setting.device, **budgets)

    plain = copy.deepcopy(gm) if options.verify is True else None
    spare = twin(gm)
    try:
        compiled = planned(gm, inputs, setting)
    except NothingPlanned:
        return of_a_range(counted(unplanned(gm, inputs, options), setting.name, setting.family, setting.calls))
    except NoRange as why:
        log.info("%s: this length is compiled alone: %s", setting.frame, why)
        _specialize(inputs)
        compiled = planned(gm, inputs, setting)

    def measured(compiled: Compiled, setting: Setting) -> Compiled:
        def recompile(step: FirstStep, args: list[Any]) -> Compiled:
            return planned(twin(spare), args, replace(setting, first_step=step))

        return kept(compiled, setting.first_step, recompile)

    def for_more(calls: int, args: list[Any]) -> Compiled:
        more = replace(setting, calls=calls, first_step=setting.first_step.another())
        return measured(planned(twin(spare), args, more), more)

    if not any(is_symbolic(size) for size in sizes_of(inputs)):  # what one length held is no measure for another
        compiled = for_all_calls(measured(compiled, setting), setting.name, setting.calls, for_more)
    else:
        compiled = of_a_range(compiled)
    return compiled if plain is None else verified(compiled, gm, plain, reference)


def _specialize(inputs: Sequence[Any]) -> None:
    """Each symbolic size gets a guard, and another size is planned again."""
    for size in sizes_of(inputs):
        int(size)


def _asks(backend: Any, arguments: Mapping[str, Any], inputs: Sequence[Any]) -> bool:
    """Whether a backend is one of these, with a budget to keep."""
    if backend not in (memo, memo_eager):
        return False
    from memo_compile.trace.setting import asks, device_of  # loaded when a backend is used

    return asks(Options.parse(arguments.get("options"), mode=arguments.get("mode")), device_of(inputs))


def _is_ours(backend: Any) -> bool:
    return unwrapped(backend)[0] in (memo, memo_eager)


# torch loads this module when it looks a backend up, before it traces or cuts anything.
keep_whole(_asks)
keep_symbolic(_is_ours)
