"""The two torch.compile backends, found through the entry-point group `torch_dynamo_backends`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.errors import SizeUnknown
from memo_compile.options import Options
from memo_compile.runtime.verification import verified
from memo_compile.trace.frames import note_graph_break, note_shapes
from memo_compile.versions import check_torch

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
    parsed = _start(options, mode, inputs)
    from memo_compile.codegen.compiler import compile_planned

    if parsed.verify is not True:
        return compile_planned(gm, list(inputs), parsed)
    plain = copy.deepcopy(gm)
    return verified(compile_planned(gm, list(inputs), parsed), plain, "inductor")


def memo_eager(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """Plan a graph with the same passes, and run it op by op: for debugging, as `aot_eager` is to `inductor`.

    Arguments and errors are those of `memo`; there is no arena, and every op allocates for itself.
    """
    parsed = _start(options, mode, inputs)
    from memo_compile.codegen.interpreter import run_planned

    if parsed.verify is not True:
        return run_planned(gm, list(inputs), parsed)
    plain = copy.deepcopy(gm)
    return verified(run_planned(gm, list(inputs), parsed), plain, "aot_eager")


def _start(options: Mapping[str, Any] | None, mode: str | None, inputs: Sequence[Any]) -> Options:
    check_torch()
    parsed = Options.parse(options, mode=mode)
    _specialize(inputs)
    note_graph_break()
    note_shapes(inputs)
    from memo_compile.runtime.ops import register

    register()
    return parsed


def _specialize(inputs: Sequence[Any]) -> None:
    """Plans are made for numbers: each symbolic size gets a guard, and another size is planned again."""
    if any(isinstance(value, torch.Tensor) and value.is_nested for value in inputs):
        raise SizeUnknown("a nested tensor among the inputs")
    for value in inputs:
        if isinstance(value, torch.SymInt):
            int(value)
        elif isinstance(value, torch.Tensor):
            for size in (*value.shape, *value.stride()):
                int(size)
