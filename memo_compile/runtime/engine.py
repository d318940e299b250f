"""What the transfer ops need of an engine: copies that run beside the computation, and waits for them.

Code above this interface does not know whether threads or streams are behind it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch


class Engine(Protocol):
    """Asynchronous copies between the device and a host lease, one queue each way."""

    def offload(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """Start to copy `src` to the lease's bytes from `offset` on, once `src` has been produced."""
        ...

    def offload_wait(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """From here on the computation may write where `src` lies."""
        ...

    def prefetch(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """Start to copy the lease's bytes to `dst`, once the computation has passed the last reader of that place."""
        ...

    def prefetch_wait(self, dst: torch.Tensor) -> None:
        """From here on the computation may read `dst`."""
        ...

    def drain(self) -> None:
        """Wait for every copy that was started, and forget it."""
        ...


@dataclass(frozen=True)
class Copied:
    """One finished copy: `kind` is "D2H" or "H2D", times are seconds of `time.perf_counter`."""

    kind: str
    offset: int
    nbytes: int
    begin: float
    end: float


@dataclass(frozen=True)
class TransferStats:
    """Bytes and copies each way since the process began, and seconds that the computation waited for them."""

    bytes_out: int = 0
    bytes_in: int = 0
    copies_out: int = 0
    copies_in: int = 0
    wait_seconds: float = 0.0


@dataclass
class Recorder:
    """Counts what an engine does; keeps a trace of single copies while one is asked for."""

    stats: TransferStats = field(default_factory=TransferStats)
    trace: list[Copied] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def started(self, kind: str, nbytes: int) -> None:
        """A copy was queued."""
        with self._lock:
            s = self.stats
            if kind == "D2H":
                self.stats = replace(s, bytes_out=s.bytes_out + nbytes, copies_out=s.copies_out + 1)
            else:
                self.stats = replace(s, bytes_in=s.bytes_in + nbytes, copies_in=s.copies_in + 1)

    def finished(self, copied: Copied) -> None:
        """A copy has ended."""
        with self._lock:
            if self.trace is not None:
                self.trace.append(copied)

    def waited(self, seconds: float) -> None:
        """The computation stood still."""
        with self._lock:
            self.stats = replace(self.stats, wait_seconds=self.stats.wait_seconds + seconds)


def host_view(lease: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """The lease's bytes from `offset` on as a dense tensor of the shape and dtype of `like`.

    Host bytes hold a value in row-major order, whatever strides it has on the device.
    """
    nbytes = like.numel() * like.element_size()
    return lease[offset : offset + nbytes].view(like.dtype).view(like.shape)
