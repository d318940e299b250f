"""The two torch.compile backends, found through the entry-point group `torch_dynamo_backends`.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: the instruction translator that is current while a backend is
called, to know which code object Dynamo compiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.errors import RecompileLimit
from memo_compile.logs import logger
from memo_compile.options import Options
from memo_compile.registry import registry
from memo_compile.verification import verified
from memo_compile.versions import check_torch

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
        RecompileLimit: the frame was compiled for as many shapes as Dynamo allows.
    """
    parsed = _start(options, mode, inputs)
    from memo_compile.codegen.compiler import compile_planned

    if not parsed.verify:
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
    from memo_compile.interpreter import run_planned

    if not parsed.verify:
        return run_planned(gm, list(inputs), parsed)
    plain = copy.deepcopy(gm)
    return verified(run_planned(gm, list(inputs), parsed), plain, "aot_eager")


def _start(options: Mapping[str, Any] | None, mode: str | None, inputs: Sequence[Any]) -> Options:
    check_torch()
    parsed = Options.parse({**(options or {}), **({"mode": mode} if mode is not None else {})})
    _specialize(inputs)
    _note_shapes(inputs)
    from memo_compile.runtime.ops import register

    register()
    return parsed


def _specialize(inputs: Sequence[Any]) -> None:
    """Plans are made for numbers: each symbolic size gets a guard, and another size is planned again."""
    for value in inputs:
        if isinstance(value, torch.SymInt):
            int(value)
        elif isinstance(value, torch.Tensor):
            for size in (*value.shape, *value.stride()):
                int(size)


def _note_shapes(inputs: Sequence[Any]) -> None:
    """Dynamo runs a frame eagerly, with only a log line, once its recompile limit is reached: memo raises before."""
    code = _code_being_compiled()
    if code is None:
        return
    if code.co_name.startswith("torch_dynamo_resume_in"):
        log.warning(
            "graph break: %s continues %s in a graph of its own. memo makes a plan for each graph, this is number %d, "
            "and memory_budget holds for each alone; TORCH_LOGS=graph_breaks tells why.",
            code.co_name,
            code.co_filename,
            registry().count + 1,
        )
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    shapes = tuple(tuple(int(s) for s in v.shape) for v in inputs if isinstance(v, torch.Tensor))
    known = registry()
    with known.lock:
        seen = known.shapes.setdefault(code, [])
        if not _debug_get_cache_entry_list(code):
            seen.clear()
        if shapes not in seen:
            seen.append(shapes)
        if len(seen) < config.recompile_limit:
            return
        varying = _varying(seen)
        seen.remove(shapes)
    raise RecompileLimit(
        f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno}) was given {len(varying)} shapes, "
        f"one plan each, and torch._dynamo.config.recompile_limit is {config.recompile_limit}; beyond it Dynamo "
        f"would silently run eagerly, without any budget. Sizes seen: {', '.join(varying)}. Pad the inputs to a "
        "multiple of a fixed length, or raise torch._dynamo.config.recompile_limit."
    )


def _varying(seen: Sequence[tuple[tuple[int, ...], ...]]) -> list[str]:
    """For each set of shapes, the sizes in which they differ."""
    flat = [tuple(size for shape in shapes for size in shape) for shapes in seen]
    if len({len(sizes) for sizes in flat}) > 1:
        return [str(shapes) for shapes in seen]
    at = [i for i in range(len(flat[0])) if len({sizes[i] for sizes in flat}) > 1]
    return ["x".join(str(s) for s in dict.fromkeys(sizes[i] for i in at)) for sizes in flat]


def _code_being_compiled() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        return None  # called directly, outside Dynamo
