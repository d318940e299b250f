"""A measured step in the dump: the second forward and the second backward on CUDA, as traces for Perfetto.

Each is profiled by itself, since autograd runs the backward in a thread of its own. The first call is left alone: it
fills caches and takes its segments.

Private torch API, tried with torch 2.13: `torch._C._autograd._profiler_enabled`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any


def profiled(fn: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """`fn`, whose second call is written to `path` in Chrome's trace format, with the streams of the device.

    A profiler that the user runs is left alone; then nothing is written.
    """
    calls = itertools.count()

    def run(*args: Any) -> Any:
        import torch  # takes a second, and not every caller needs it

        cuda = torch.cuda.is_initialized()
        capturing = cuda and torch.cuda.is_current_stream_capturing()
        if next(calls) != 1 or capturing or torch._C._autograd._profiler_enabled():
            return fn(*args)
        with torch.profiler.profile() as profile:
            result = fn(*args)
            if cuda:
                torch.cuda.synchronize()
        profile.export_chrome_trace(str(path))
        return result

    if getattr(fn, "_boxed_call", False):
        run._boxed_call = True  # type: ignore[attr-defined]
    return run
