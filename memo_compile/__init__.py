"""memo: a torch.compile backend that trains models whose activations do not fit on the device.

    torch.compile(model, backend="memo", options={"memory_budget": "48GiB"})

Public names, modules among them, are loaded when they are first asked for: importing the package imports neither
Inductor nor HiGHS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "BudgetTooSmall": "memo_compile.errors",
    "MemoError": "memo_compile.errors",
    "Options": "memo_compile.options",
    "Plan": "memo_compile.schema",
    "empty_cache": "memo_compile.runtime.memory_usage",
    "explain": "memo_compile.report.explain",
    "loss_only": "memo_compile.api",
    "measure_peak": "memo_compile.runtime.memory_usage",
    "plan": "memo_compile.api",
    "plans": "memo_compile.api",
    "reset": "memo_compile.api",
    "sequence_parallel": "memo_compile.api",
    "transfer_stats": "memo_compile.runtime.ops",
}

_SUBMODULES = ("errors", "models", "placement")

if TYPE_CHECKING:
    from memo_compile import errors as errors
    from memo_compile import models as models
    from memo_compile import placement as placement
    from memo_compile.api import loss_only, plan, plans, reset, sequence_parallel
    from memo_compile.errors import BudgetTooSmall, MemoError
    from memo_compile.options import Options
    from memo_compile.report.explain import explain
    from memo_compile.runtime.memory_usage import empty_cache, measure_peak
    from memo_compile.runtime.ops import transfer_stats
    from memo_compile.schema import Plan


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BudgetTooSmall",
    "MemoError",
    "Options",
    "Plan",
    "empty_cache",
    "explain",
    "loss_only",
    "measure_peak",
    "plan",
    "plans",
    "reset",
    "sequence_parallel",
    "transfer_stats",
]
