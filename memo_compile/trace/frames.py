"""The frame that Dynamo is compiling: is it a part of what the user compiled, and will Dynamo compile it once more?

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: the instruction translator that is current while a backend is
called, a code object's cache entries, the names of the wrapper that `torch.compile` puts around a function, and (2.13
alone) the reason for a compilation in Dynamo's metrics.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from memo_compile.errors import RecompileLimit
from memo_compile.logs import logger
from memo_compile.passes.fx.sizes import seen
from memo_compile.registry import Shapes, registry

log = logger("memo_compile")

_TORCH = os.path.dirname(torch.__file__) + os.sep
_DYNAMO = os.path.join(_TORCH, "_dynamo") + os.sep
_WRAPPERS = ("compile_wrapper", "_fn")  # in torch/_dynamo/eval_frame.py


def note_graph_break() -> None:
    """Say that what was compiled falls into several graphs: each has a plan, and a budget, of its own."""
    code = getattr(_translator(), "f_code", None)
    function, between = _callers()
    if code is None or function is None:
        return
    local = _translator().f_locals
    known = registry()
    with known.lock:
        number = known.graphs.get(id(function), 0) + 1 if between else 1
        known.graphs[id(function)] = number
    if between:
        log.warning(
            "graph break: %s is graph number %d of %s. memo makes a plan for each graph: memory_budget in bytes is for "
            "what they hold together, a ratio is asked of each, and transfers do not overlap across the break. "
            "TORCH_LOGS=graph_breaks tells the line and the reason.",
            *(_in_words(code, local), number, _name_of(function)),
        )


def _name_of(function: Any) -> str:
    """What the user compiled: the module, where Dynamo was given one's call."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        return type(owner).__qualname__
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _in_words(code: Any, local: Mapping[str, Any]) -> str:
    """A frame's function and place; where it is torch's own, as that of `module.compile()` is, the module's forward."""
    module = local.get("self")
    if code.co_filename.startswith(_TORCH) and isinstance(module, torch.nn.Module):
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", code)
    return f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"


def frame_name() -> str:
    """The frame that Dynamo is compiling, in words; "" outside of Dynamo."""
    translator = _translator()
    code = getattr(translator, "f_code", None)
    if code is None:
        return ""
    # A decorated forward is a frame of its decorator's: the module is what a user knows.
    first = next(iter(translator.f_locals.get("args", ())), None) if code.co_name != "forward" else None
    if not isinstance(first, torch.nn.Module):
        return _in_words(code, translator.f_locals)
    forward = _decorated(type(first).forward, code)
    return _in_words(forward, {}) if forward is not None else f"{type(first).__qualname__}, in {_in_words(code, {})}"


def _decorated(function: Any, code: Any) -> Any:
    """The code that decorators, of which `code` is one, were put around; None where it is none of the function's."""
    layers = [function]
    while (inner := getattr(layers[-1], "__wrapped__", None)) is not None:
        layers.append(inner)
    codes = [getattr(layer, "__code__", None) for layer in layers]
    return codes[-1] if code in codes else None


def frame_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is compiling; None for another function, and outside of Dynamo."""
    found = (getattr(_translator(), "f_locals", None) or {}).get("self")
    return found if isinstance(found, torch.nn.Module) else None


def compiled_module() -> torch.nn.Module | None:
    """The module that the user compiled, of which the frame is at least a part; None for another function."""
    found = getattr(_callers()[0], "__self__", None)
    return found if isinstance(found, torch.nn.Module) else None


def _callers() -> tuple[Any, list[str]]:
    """The function that the user compiled, and the user's frames between its call and the frame that is compiled.

    There are some where Dynamo could not take a frame whole: then it runs, and what it calls is compiled by itself.
    """
    between: list[str] = []
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        frame = back
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name in _WRAPPERS and file == os.path.join(_DYNAMO, "eval_frame.py"):
            return frame.f_locals.get("fn"), between
        if file.startswith(_DYNAMO):
            between.clear()  # Dynamo itself, which is behind the frame that it compiles
        elif not file.startswith(_TORCH):
            between.append(name)
    return None, between


def note_shapes(inputs: Sequence[Any]) -> None:
    """Remember the shapes that the frame is compiled for."""
    translator = _translator()
    if translator is None:
        return
    code = translator.f_code
    entries, _ = _entries(code, translator.f_locals)
    shapes = tuple(tuple(seen(s) for s in v.shape) for v in inputs if isinstance(v, torch.Tensor))
    known = registry()
    with known.lock:
        before = known.shapes.setdefault(code, [])
        if not entries:
            before.clear()
        if shapes in before:
            before.remove(shapes)
        before.append(shapes)


def check_limit() -> None:
    """Call this for a graph of which something is planned.

    Dynamo runs a frame eagerly, with only a log line, beyond its recompile limit, and calls no backend then. So memo
    refuses the last compilation before.

    Raises:
        RecompileLimit: with the sizes seen.
    """
    translator = _translator()
    if translator is None or not _is_last(translator):
        return
    known, code = registry(), translator.f_code
    with known.lock:
        before = known.shapes.get(code, [])
        varying = _varying(before)
        if before:
            before.pop()
    raise RecompileLimit(_limit_in_words(translator, varying))


def warn_at_limit() -> None:
    """Call this for a graph of which nothing is planned, in a frame whose budget other graphs may need."""
    translator = _translator()
    if translator is not None and _is_last(translator):
        log.warning("%s", _limit_in_words(translator, _varying(registry().shapes.get(translator.f_code, []))))


def _is_last(translator: Any) -> bool:
    """Whether this is the last compilation that Dynamo's limits allow."""
    from torch._dynamo import config  # loads Dynamo

    entries, alike = _entries(translator.f_code, translator.f_locals)
    return bool(alike) and (alike + 1 >= config.recompile_limit or entries + 1 >= config.accumulated_recompile_limit)


def _limit_in_words(translator: Any, varying: Sequence[str]) -> str:
    from torch._dynamo import config  # loads Dynamo

    _, alike = _entries(translator.f_code, translator.f_locals)
    what = _in_words(translator.f_code, translator.f_locals)
    return (
        f"{what} is compiled {alike + 1} times, for {len(varying)} different shapes, and "
        f"torch._dynamo.config.recompile_limit is {config.recompile_limit}; beyond it Dynamo would silently run "
        f"eagerly, without any budget. Sizes seen: {', '.join(varying)}.{_reason()} Write "
        f"torch._dynamo.config.recompile_limit = {8 * config.recompile_limit} before the first step, or pad the inputs "
        "to few lengths; TORCH_LOGS=recompiles tells what else has changed."
    )


def _reason() -> str:
    """What Dynamo says has changed since an earlier compilation: a size, or a number that a line made of one."""
    from torch._dynamo import utils  # loads Dynamo

    context: Any = utils.get_metrics_context() if hasattr(utils, "get_metrics_context") else None
    reason = str(getattr(context, "_metrics", {}).get("recompile_reason") or "").strip()
    return f" What has changed last: {reason.splitlines()[0]}." if reason else ""


def _entries(code: Any, local: dict[str, Any]) -> tuple[int, int]:
    """How often a code object is compiled, and how often for the modules it is called with now, as Dynamo counts."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # loads Dynamo

    entries = _debug_get_cache_entry_list(code)
    return len(entries), sum(_same_modules(entry, local) for entry in entries)


def _same_modules(entry: Any, local: dict[str, Any]) -> bool:
    matched = getattr(entry.guard_manager, "id_matched_objs", {})
    return all(made() is None or made() is local.get(name) for name, made in matched.items())


def _varying(given: Sequence[Shapes]) -> list[str]:
    """For each set of shapes, the sizes in which they differ; all of them where there is only one set."""
    flat = [tuple(size for shape in shapes for size in shape) for shapes in given]
    if len({len(sizes) for sizes in flat}) > 1 or len(flat) == 1:
        return [str(shapes) for shapes in given]
    at = [i for i in range(len(flat[0])) if len({sizes[i] for sizes in flat}) > 1]
    return ["x".join(str(s) for s in dict.fromkeys(sizes[i] for i in at)) for sizes in flat]


def _translator() -> Any:
    """Dynamo's translator of the frame that is compiled; None outside Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # loads Dynamo

    try:
        return InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None
