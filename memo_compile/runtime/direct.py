"""memo's transfers as plain functions, for emitted code: torch's dispatcher takes about as long as they do.

A profiler sees ops alone, so that they go through the dispatcher while one looks on.

Private torch APIs, tried with torch 2.13: `torch._C._autograd._profiler_enabled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memo_compile.runtime.ops import FUNCTIONS, register

Function = Callable[..., Any]


def _direct(name: str) -> Function:
    register()
    op: Any = getattr(torch.ops.memo, name).default
    function, is_profiled = FUNCTIONS[name], torch._C._autograd._profiler_enabled

    def call(*args: Any) -> Any:
        return op(*args) if is_profiled() else function(*args)

    return call


offload = _direct("offload")
offload_wait = _direct("offload_wait")
prefetch = _direct("prefetch_")
wait = _direct("wait_")
prefetch_buffer = _direct("prefetch_buffer")
