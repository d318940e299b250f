"""The engine for CUDA: one stream each way and events, ordered against the stream that is current when running."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from memo_compile.runtime.engine import Copy, Engine, Recorder


@dataclass(eq=False)
class _Queued(Copy):
    """A copy on a stream. It holds the device side alone: the host side's block is guarded by the engine's rules."""

    done: Any
    tensor: torch.Tensor
    captured: bool  # recorded into a CUDA graph


class StreamEngine(Engine):
    """Copies on two CUDA streams of one device.

    `cuda` is `torch.cuda`, or what stands for it (see `_Cuda`). The current stream is asked for at every call, since it
    is the caller's to change.
    """

    def __init__(self, device: torch.device, recorder: Recorder | None = None, cuda: Any = None) -> None:
        super().__init__(recorder)
        self._device = device
        self._cuda = cuda or _Cuda()
        self._streams = {"D2H": self._cuda.Stream(device), "H2D": self._cuda.Stream(device)}

    def computation(self) -> int:
        """See `Engine`: the current stream."""
        return int(self._cuda.current_stream(self._device).cuda_stream)

    def _queue_behind_computation(self, kind: str) -> None:
        self._streams[kind].wait_stream(self._cuda.current_stream(self._device))

    def _launch(self, copy: Copy, src: torch.Tensor, dst: torch.Tensor, after: Copy | None) -> Copy:
        stream = self._streams[copy.kind]
        captured = self._cuda.capturing()
        # A capture begins with the device idle, and events do not reach across its border.
        if isinstance(after, _Queued) and after.captured == captured:
            stream.wait_event(after.done)
        for to, origin in pieces(dst.detach(), src.detach()):
            self._cuda.copy(to, origin, stream)
        done = self._cuda.Event()
        done.record(stream)
        tensor = src if copy.kind == "D2H" else dst
        fields = (copy.kind, copy.lease, copy.offset, copy.device, copy.nbytes, copy.thread)
        return _Queued(*fields, done, tensor.detach(), captured)

    def _order(self, copy: Copy) -> None:
        assert isinstance(copy, _Queued)
        self._cuda.current_stream(self._device).wait_event(copy.done)
        # The allocator hands a freed block out again in the order of the current stream, which is now behind the copy.
        copy.tensor = _NOTHING

    def _join(self, copy: Copy) -> None:
        assert isinstance(copy, _Queued)
        if not copy.captured:
            copy.done.synchronize()
        copy.tensor = _NOTHING

    def _let_go(self, copy: Copy) -> None:
        self._join(copy)


_NOTHING = torch.empty(0)
MOST_PIECES = 1024  # of one slice: each costs the host some microseconds


def pieces(dst: torch.Tensor, src: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One copy as copies between dense parts, such as the token rows of each head.

    torch copies between host and device through a temporary of the whole on the device where one side is strided:
    bytes that nobody has counted, and one more pass over them. Dense parts go straight from where they lie. Where
    there would be too many parts, or a single row is strided, the temporary is the lesser evil.

    >>> whole = torch.zeros(2, 8, 4)
    >>> [tuple(to.shape) for to, _ in pieces(torch.zeros(2, 3, 4), whole[:, :3])]
    [(3, 4), (3, 4)]
    """
    outer = 0
    while not (_dense_inside(dst, outer) and _dense_inside(src, outer)):
        outer += 1
    if outer == 0 or outer == dst.dim() or math.prod(dst.shape[:outer]) > MOST_PIECES:
        return [(dst, src)]
    return [(dst[at], src[at]) for at in itertools.product(*(range(size) for size in dst.shape[:outer]))]


def _dense_inside(value: torch.Tensor, outer: int) -> bool:
    """Whether each part of a value at one place of its first `outer` dimensions is dense."""
    return value.numel() == 0 or value[(0,) * outer].is_contiguous()


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
    def copy(dst: torch.Tensor, src: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Queue a copy on a stream."""
        with torch.cuda.stream(stream), torch.no_grad():
            dst.copy_(src, non_blocking=True)
