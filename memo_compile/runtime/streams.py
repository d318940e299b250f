"""The engine for CUDA: one stream each way and events, ordered against the stream that is current when running."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memo_compile.hardware.device_memory import held, obtainable
from memo_compile.runtime import cudart
from memo_compile.runtime.engine import Copy, Direction, Engine, Recorder, host_view
from memo_compile.runtime.pieces import Plane, pieces, planes_from_host, planes_to_host


@dataclass(eq=False, slots=True)
class _Queued(Copy):
    """A copy on a stream. It holds the device side alone: the host side's block is guarded by the engine's rules."""

    done: Any = None
    tensor: torch.Tensor | None = None
    captured: bool = False  # recorded into a CUDA graph


class StreamEngine(Engine):
    """Copies on two CUDA streams of one device.

    `cuda` is `torch.cuda`, or what stands for it (see `_Cuda`). The current stream is asked for at every call, since it
    is the caller's to change.
    """

    def __init__(self, device: torch.device, recorder: Recorder | None = None, cuda: Any = None) -> None:
        super().__init__(recorder)
        self._device = device
        self._cuda = cuda or _Cuda()
        self._streams = {way: self._cuda.Stream(device) for way in Direction}
        self._retried_at = sys.maxsize  # bytes: the least for which the allocator had to give back what it keeps

    def computation(self) -> int:
        """See `Engine`: the current stream."""
        return int(self._cuda.current_stream(self._device).cuda_stream)

    def spare(self, nbytes: int, device: torch.device) -> torch.Tensor | None:
        """See `Engine`. An attempt that fails makes the allocator wait for the device: it looks before it tries.

        What the allocator keeps may lie in parts that are too small. Where it did, so much is not tried again unless
        the device itself has it free.
        """
        kept, retries = self._cuda.kept(device)
        from_kept = nbytes <= kept and nbytes < self._retried_at
        if not from_kept and nbytes > self._cuda.free(device):
            return None
        place = super().spare(nbytes, device)
        if from_kept and self._cuda.kept(device)[1] > retries:
            self._retried_at = nbytes
        return place

    def _queue_after_computation(self, kind: Direction) -> None:
        self._streams[kind].wait_stream(self._cuda.current_stream(self._device))

    def _copy(self, kind: Direction, lease: int, offset: int, device: int, nbytes: int, thread: int) -> Copy:
        return _Queued(kind, lease, offset, device, nbytes, thread)

    def _launch(self, copy: Copy, device: torch.Tensor, lease: torch.Tensor, after: Copy | None) -> None:
        assert isinstance(copy, _Queued)
        stream = self._streams[copy.kind]
        captured = self._cuda.capturing()
        # A capture begins with the device idle, and events do not reach across its border.
        if isinstance(after, _Queued) and after.captured == captured:
            stream.wait_event(after.done)
        self._queue(copy, device, lease, stream)
        done = self._cuda.Event()
        done.record(stream)
        copy.done, copy.captured = done, captured
        copy.tensor = device.detach() if device.requires_grad else device

    def _queue(self, copy: Copy, device: torch.Tensor, lease: torch.Tensor, stream: Any) -> None:
        """By address, which takes the processor least, else by torch."""
        to_host = copy.kind is Direction.D2H
        flat: list[Plane] = []
        if copy.offset + copy.nbytes <= lease.nbytes and lease.is_contiguous():  # else torch complains
            flat = (planes_to_host if to_host else planes_from_host)(device, copy.lease + copy.offset)
        if flat and self._cuda.copy_planes(flat, copy.kind, stream):
            return
        host = host_view(lease, copy.offset, device)
        dst, src = (host, device.detach()) if to_host else (device.detach(), host)
        with self._cuda.on(stream):
            for to, origin in pieces(dst, src):
                self._cuda.copy(to, origin, stream)

    def _finish(self, kind: Direction) -> None:
        if not self._cuda.capturing():  # then nothing runs yet, and the capture ends with the error
            with contextlib.suppress(RuntimeError):  # the device is lost: what is on its way is the first error
                self._streams[kind].synchronize()

    def _order(self, copy: Copy) -> None:
        assert isinstance(copy, _Queued)
        self._cuda.current_stream(self._device).wait_event(copy.done)
        # The allocator hands a freed block out again in the order of the current stream, which is now after the copy.
        copy.tensor = None

    def _join(self, copy: Copy) -> None:
        assert isinstance(copy, _Queued)
        if not copy.captured:
            copy.done.synchronize()
        copy.tensor = None

    def _let_go(self, copy: Copy) -> None:
        self._join(copy)


class _Cuda:
    """`torch.cuda` as the engine needs it."""

    Stream = torch.cuda.Stream
    Event = torch.cuda.Event
    current_stream = staticmethod(torch.cuda.current_stream)

    @staticmethod
    def capturing() -> bool:
        """Whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    @staticmethod
    @contextlib.contextmanager
    def on(stream: torch.cuda.Stream) -> Iterator[None]:
        """What is queued within goes to a stream."""
        with torch.cuda.stream(stream), torch.no_grad():
            yield

    @staticmethod
    def copy(dst: torch.Tensor, src: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Queue a copy, within `on(stream)`."""
        dst.copy_(src, non_blocking=True)

    @staticmethod
    def copy_planes(flat: Sequence[Plane], kind: Direction, stream: torch.cuda.Stream) -> bool:
        """Queue copies by address; whether the runtime took all of them."""
        return cudart.copy_planes(flat, kind, int(stream.cuda_stream))

    @staticmethod
    def kept(device: torch.device) -> tuple[int, int]:
        """Bytes of whole segments that the allocator keeps unused; how often it has given such back to try again."""
        found = held(device)
        return found.unused, found.retries

    @staticmethod
    def free(device: torch.device) -> int:
        """Bytes that the device has free for this process."""
        if torch.cuda.is_current_stream_capturing():
            return sys.maxsize  # the allocator then waits for nothing
        return obtainable(device)
