"""What the probes share: where they run, seconds of the device and of the processor, page-locked memory."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GIB = 2**30
Answer = dict[str, Any]


class AsksCuda(Exception):
    """A probe whose question no CPU can be asked."""


@dataclass(frozen=True)
class Scene:
    """Where a probe runs. `tiny` is for a test of the probe itself: small, on the CPU, op by op."""

    tiny: bool = False

    @property
    def device(self) -> str:
        """The type of the device."""
        return "cpu" if self.tiny else "cuda"

    @property
    def backend(self) -> str:
        """memo."""
        return "memo_eager" if self.tiny else "memo"

    @property
    def plain(self) -> str:
        """What compiles without memo."""
        return "aot_eager" if self.tiny else "inductor"

    def size(self, full: int) -> int:
        """A number of tokens."""
        return full // 128 if self.tiny else full

    def synchronize(self) -> None:
        """Wait until the device is done."""
        if not self.tiny:
            torch.cuda.synchronize()


def on_cuda(scene: Scene) -> None:
    """Call this where only a CUDA device has the answer.

    Raises:
        AsksCuda: this is no such device.
    """
    if scene.tiny:
        raise AsksCuda


def timed(fn: Callable[[], Any], scene: Scene = Scene()) -> float:
    """Seconds until the device is done."""
    scene.synchronize()
    started = time.perf_counter()
    fn()
    scene.synchronize()
    return time.perf_counter() - started


def issued(fn: Callable[[], Any], scene: Scene = Scene()) -> float:
    """Seconds until the processor is free again."""
    scene.synchronize()
    started = time.perf_counter()
    fn()
    seconds = time.perf_counter() - started
    scene.synchronize()
    return seconds


def locked(size: int, flags: int = mmap.MAP_SHARED, advice: Sequence[int] = ()) -> tuple[Tensor, float]:
    """An anonymous mapping that is page-locked, and the seconds that locking took. It stays until the process ends."""
    mapping = mmap.mmap(-1, size, flags=flags | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for kind in advice:
        if ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), kind):
            raise OSError(ctypes.get_errno(), "madvise")
    started = time.perf_counter()
    error = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    seconds = time.perf_counter() - started
    if error:
        raise OSError(error, "cudaHostRegister")
    return torch.frombuffer(mapping, dtype=torch.uint8), seconds


def pinned_by_torch() -> int:
    """Bytes that torch's own allocator has page-locked at most."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)) if torch.cuda.is_available() else 0
