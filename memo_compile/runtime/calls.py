"""What stands around a compiled forward and backward that move slices: a fault leaves no copy and no lease behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memo_compile.errors import ArenaDoesNotFit
from memo_compile.hardware.host_memory import free_host_memory
from memo_compile.runtime.cross_call import Schedule
from memo_compile.runtime.engine import Span, SpanKind
from memo_compile.runtime.ops import cross_calls, engine, reclaim

Boxed = Callable[[list[Any]], Any]


def forward_call(
    compiled: Boxed, device: torch.device, lease_at: int, schedule: Callable[[], Schedule | None]
) -> Boxed:
    """A forward whose output `lease_at` is the host lease. `schedule` is known once the backward is compiled."""

    def run(args: list[Any]) -> Any:
        begin = time.perf_counter()
        with _nothing_left(device):
            outputs = compiled(args)
        lease = outputs[lease_at]
        known = schedule()
        if known is not None:
            cross_calls(device).made(lease, known)
        if saved_tensors_are_packed():
            engine(device).finish_offloads()
        _trace(SpanKind.FORWARD, device, lease, begin)
        return outputs

    return boxed(run)


def backward_call(compiled: Boxed, device: torch.device, lease_at: int) -> Boxed:
    """A backward whose input `lease_at` is the host lease."""

    def run(args: list[Any]) -> Any:
        begin = time.perf_counter()
        lease = args[lease_at]
        reclaim()
        with _nothing_left(device):
            cross_calls(device).begins(lease)
            outputs = compiled(args)
        _trace(SpanKind.BACKWARD, device, lease, begin)
        return outputs

    return boxed(run)


def boxed(run: Boxed) -> Boxed:
    """Say that a function takes its arguments in a list, which it may empty."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _trace(kind: SpanKind, device: torch.device, lease: torch.Tensor, begin: float) -> None:
    recorder = engine(device).recorder
    if recorder.trace is not None:
        recorder.add(Span(kind=kind, lease=lease.data_ptr(), offset=0, nbytes=0, begin=begin, end=time.perf_counter()))


@contextlib.contextmanager
def _nothing_left(device: torch.device) -> Iterator[None]:
    """Whatever ends the call, no copy of it is still under way after it."""
    try:
        yield
    except BaseException as error:
        engine(device).abandon()
        if _is_out_of_memory(error):
            raise ArenaDoesNotFit(str(error), _free(device)) from error
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(
        error
    )  # c10's allocator has no class of its own
    return cpu or isinstance(error, torch.OutOfMemoryError)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])

    return free_host_memory()


def saved_tensors_are_packed() -> bool:
    """Whether hooks will read saved tensors, the lease among them, on the host.

    Private: `torch._C._autograd._top_saved_tensors_default_hooks`, tried with torch 2.11, 2.13 and 2.15.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
