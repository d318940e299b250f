"""Records what is allocated while something runs, and which op took it.

Private torch APIs, tried with torch 2.13: the profiler without Kineto (`torch.autograd._enable_profiler_legacy`), whose
events of one thread come in their order, ops with the shapes of their operands. It reports what both allocators do,
on the CPU and on CUDA, and changes no statistics of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Key = tuple[str, tuple[tuple[int, ...], ...]]  # an op's name, and the shapes of its operands that are tensors


@dataclass(frozen=True)
class Record:
    """Bytes above what was held before, at most and at the end; of each op that was called, the most that it took.

    What an op takes is what it allocates beyond what is left when it has ended.
    """

    peak: int
    held: int
    taken: Mapping[Key, int]


def can_record() -> bool:
    """Whether no profiler runs already: one that the user runs is left alone."""
    import torch  # takes a second, and not every caller needs it

    return not torch._C._autograd._profiler_enabled()


def recorded(fn: Callable[..., Any], *args: Any, device: str) -> tuple[Any, Record]:
    """The result of `fn(*args)`, and what it allocated in this thread on devices of type `device`."""
    import torch  # takes a second, and not every caller needs it

    profiler: Any = torch.autograd
    shapes, memory, stack, flops, modules = True, True, False, False, False
    experimental = torch._C._profiler._ExperimentalConfig()
    config = profiler.ProfilerConfig(profiler.ProfilerState.CPU, shapes, memory, stack, flops, modules, experimental)
    profiler._enable_profiler_legacy(config)
    try:
        result = fn(*args)
    finally:
        threads = profiler._disable_profiler_legacy()
    return result, read_events([e for t in threads for e in t], device)


def read_events(events: Sequence[Any], device: str) -> Record:
    """What the profiler's events say, in the order in which they came.

    What is allocated counts for the outermost op: functions of Python's own that stand around it have no "::".
    """
    held = peak = start = top = 0
    taken: dict[Key, int] = {}
    around: list[Key | None] = []  # of what runs now, the outermost first: an op, or something else
    for event in events:
        kind = event.kind()
        if kind == "push":
            inside = any(around)
            around.append(None if inside or "::" not in event.name() else _key(event))
            start, top = (start, top) if inside else (held, held)
        elif kind == "pop":
            key = around.pop() if around else None
            extra = top - max(held, start)
            if key is not None and extra > 0:
                taken[key] = max(taken.get(key, 0), extra)
        elif kind == "memory_alloc":
            held += event.cpu_memory_usage() if device == "cpu" else event.cuda_memory_usage()
            peak, top = max(peak, held), max(top, held)
    return Record(peak, held, taken)


def _key(event: Any) -> Key:
    return event.name(), tuple(tuple(s) for s in event.shapes() if s)
