"""Measures memory at torch's allocators, knowing nothing of plans.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: the profiler without Kineto
(`torch.autograd._enable_profiler_legacy`), since the first use of Kineto takes seconds and writes to stderr, which a
log line is not worth.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from memo_compile.quiet import STDERR, nowhere
from memo_compile.runtime.ops import pool


@dataclass(frozen=True)
class Usage:
    """Bytes above what was held before: at most, and at the end."""

    peak: int
    held: int


def empty_cache() -> None:
    """Give idle host blocks back to the system, and idle device memory where a GPU is in use."""
    pool().drop_idle()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def measure_peak(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that torch's allocators held at most while `fn(*args, **kwargs)` ran, above what they held before.

    On CUDA the caching allocator is asked, of the current device; elsewhere every allocation and release on the CPU
    is recorded by torch's profiler. Host arenas lie outside and do not count.

    The profiler belongs to one thread and those of autograd that work for it. On the CPU, threads that `fn` starts by
    itself are not seen, and what they release of this thread's counts as held: measure in the thread that allocates
    (pytorch#192290: `profile_all_threads` records no memory). So do gloo's threads, which may be the last to hold what
    a collective reads or gives: 50 all-to-alls of 1 MiB, one after another, are measured as 6 to 12 MiB instead of 2.
    On CUDA all threads count.
    """
    gc.collect()  # what is freed while `fn` runs would hide as much of what it allocates
    empty_cache()
    if not torch.cuda.is_initialized():
        return _recorded(fn, *args, **kwargs)[1].peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn(*args, **kwargs)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def usage(fn: Callable[..., Any], *args: Any) -> tuple[Any, Usage | None]:
    """The result of `fn(*args)`, and what it held; None where that cannot be told without disturbing the caller.

    A running profiler is left alone, and so are CUDA's statistics: a peak below an earlier one is not seen there.
    """
    if torch.cuda.is_initialized():
        before, highest = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        result = fn(*args)
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return result, Usage(peak - before, held - before) if peak > highest else None
    if torch._C._autograd._profiler_enabled():
        return fn(*args), None
    return _lightly_recorded(fn, *args)


def _recorded(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Usage]:
    """The result of `fn`, and what the profiler saw allocated on the CPU."""
    profiler: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with nowhere(STDERR):  # Kineto says there that it starts and stops
        profiler.start()
    try:
        result = fn(*args, **kwargs)
    finally:
        with nowhere(STDERR):
            profiler.stop()
    recorded = profiler.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    return result, _usage_of([nbytes for _, nbytes in events])


def _lightly_recorded(fn: Callable[..., Any], *args: Any) -> tuple[Any, Usage]:
    """As `_recorded`, of this thread alone."""
    profiler: Any = torch.autograd
    shapes, memory, stack, flops, modules = False, True, False, False, False
    experimental = torch._C._profiler._ExperimentalConfig()
    state = profiler.ProfilerState.CPU
    profiler._enable_profiler_legacy(
        profiler.ProfilerConfig(state, shapes, memory, stack, flops, modules, experimental)
    )
    try:
        result = fn(*args)
    finally:
        threads = profiler._disable_profiler_legacy()
    return result, _usage_of([e.cpu_memory_usage() for t in threads for e in t if e.kind() == "memory_alloc"])


def _usage_of(changes: Sequence[int]) -> Usage:
    held = list(itertools.accumulate(changes, initial=0))
    return Usage(max(held), held[-1])
