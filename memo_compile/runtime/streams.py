"""The engine for CUDA: one stream each way and events, ordered against the stream that is current when running."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from memo_compile.errors import TransferFailed
from memo_compile.runtime.engine import Recorder, host_view


@dataclass(frozen=True)
class _Copy:
    done: torch.cuda.Event
    src: torch.Tensor  # references: neither side is freed before the computation has waited for the copy
    dst: torch.Tensor


class StreamEngine:
    """Copies on two CUDA streams of one device. Safe to use from several threads."""

    def __init__(self, device: torch.device, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or Recorder()
        self._device = device
        self._lock = threading.Lock()
        self._out = torch.cuda.Stream(device)
        self._in = torch.cuda.Stream(device)
        self._pending: dict[tuple[str, int, int], _Copy] = {}

    def offload(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """See `Engine`."""
        self._start(("D2H", lease.data_ptr(), offset), self._out, src, host_view(lease, offset, src))

    def offload_wait(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """See `Engine`."""
        self._finish(("D2H", lease.data_ptr(), offset))

    def prefetch(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """See `Engine`."""
        # A host block may have been leased again while its last copies were still under way: both streams see them.
        self._in.wait_stream(self._out)
        self._start(("H2D", dst.data_ptr(), 0), self._in, host_view(lease, offset, dst), dst)

    def prefetch_wait(self, dst: torch.Tensor) -> None:
        """See `Engine`."""
        self._finish(("H2D", dst.data_ptr(), 0))

    def drain(self) -> None:
        """See `Engine`."""
        with self._lock:
            self._pending.clear()
        self._out.synchronize()
        self._in.synchronize()

    def _start(
        self, key: tuple[str, int, int], stream: torch.cuda.Stream, src: torch.Tensor, dst: torch.Tensor
    ) -> None:
        # The producer of an offload, and the last reader of a landing place, are on the current stream before this.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), torch.no_grad():
            dst.copy_(src, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        with self._lock:
            self._pending[key] = _Copy(done, src, dst)
        self.recorder.started(key[0], src.numel() * src.element_size())

    def _finish(self, key: tuple[str, int, int]) -> None:
        with self._lock:
            copy = self._pending.pop(key, None)
        if copy is None:
            raise TransferFailed(f"a wait for a {key[0]} copy that was never started")
        torch.cuda.current_stream(self._device).wait_event(copy.done)
