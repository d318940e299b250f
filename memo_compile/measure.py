"""Measures peak memory at torch's allocator, knowing nothing of plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def measure_peak(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that torch's allocators held at most while `fn(*args, **kwargs)` ran, above what they held before.

    On CUDA the caching allocator is asked, of the current device; elsewhere every allocation and release on the CPU
    is recorded by torch's profiler. Host arenas lie outside and do not count.
    """
    import torch

    from memo_compile import empty_cache

    empty_cache()
    return _measure_cuda(fn, args, kwargs) if torch.cuda.is_initialized() else _measure_cpu(fn, args, kwargs)


def _measure_cuda(fn: Callable[..., Any], args: Any, kwargs: Any) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn(*args, **kwargs)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _measure_cpu(fn: Callable[..., Any], args: Any, kwargs: Any) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn(*args, **kwargs)
    recorded: Any = profiler.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    held = peak = 0
    for _, nbytes in events:
        held += nbytes
        peak = max(peak, held)
    return peak
