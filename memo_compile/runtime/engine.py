"""Copies that run beside the computation, and the order that they keep: what threads and streams have in common.

An engine moves slices between the device and a host lease, one queue each way. Code above it does not know whether
threads or streams are behind it: those say how a copy is launched, how the computation is put behind it, and how the
host waits for it. What must wait for what is said here, once, each rule in a method of its own.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import torch

from memo_compile.errors import TransferFailed


class Direction(StrEnum):
    """The two ways of a copy, each with a queue of its own."""

    D2H = "D2H"
    H2D = "H2D"


class SpanKind(StrEnum):
    """What a span is of: a copy, the moment it was queued, the computation standing still for it, or a call."""

    D2H = "D2H"
    H2D = "H2D"
    START_D2H = "start D2H"
    START_H2D = "start H2D"
    WAIT_D2H = "wait D2H"
    WAIT_H2D = "wait H2D"
    FORWARD = "forward"
    BACKWARD = "backward"


COPIES = {Direction.D2H: SpanKind.D2H, Direction.H2D: SpanKind.H2D}
STARTS = {Direction.D2H: SpanKind.START_D2H, Direction.H2D: SpanKind.START_H2D}
WAITS = {Direction.D2H: SpanKind.WAIT_D2H, Direction.H2D: SpanKind.WAIT_H2D}


# What a wait names: the way, the addresses of lease and device side, and the offset in the lease between them.
Key = tuple[Direction, int, int, int]


@dataclass(eq=False, slots=True)
class Copy:
    """One copy. `lease` and `device` are the addresses of its two sides."""

    kind: Direction
    lease: int
    offset: int
    device: int
    nbytes: int
    thread: int

    @property
    def key(self) -> Key:
        """What a wait names."""
        return (self.kind, self.lease, self.offset, self.device)


@dataclass(frozen=True)
class Span:
    """A stretch of time on the trace, in seconds of `time.perf_counter`. `lease` is the address of its host lease."""

    kind: SpanKind
    lease: int
    offset: int
    nbytes: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin


@dataclass(frozen=True)
class TransferStats:
    """Bytes and copies each way since the process began, and seconds that the computation waited for them."""

    bytes_out: int = 0
    bytes_in: int = 0
    copies_out: int = 0
    copies_in: int = 0
    wait_seconds: float = 0.0


class Recorder:
    """Counts what an engine does; keeps a trace of single spans while one is asked for.

    It is told of every copy, so that it makes no objects that nobody will look at.
    """

    def __init__(self) -> None:
        self.trace: list[Span] | None = None
        self._lock = threading.Lock()
        self._bytes, self._copies = dict.fromkeys(Direction, 0), dict.fromkeys(Direction, 0)
        self._waited = 0.0

    @property
    def stats(self) -> TransferStats:
        """What was counted so far."""
        out, back = Direction.D2H, Direction.H2D
        with self._lock:
            moved = (self._bytes[out], self._bytes[back], self._copies[out], self._copies[back])
            return TransferStats(*moved, self._waited)

    def started(self, copy: Copy) -> None:
        """A copy was queued."""
        with self._lock:
            self._bytes[copy.kind] += copy.nbytes
            self._copies[copy.kind] += 1
        if self.trace is not None:
            now = time.perf_counter()
            self.span(STARTS[copy.kind], copy, now, now)

    def waited(self, copy: Copy, begin: float) -> None:
        """The computation was put after a copy, for which it stood still since `begin`."""
        end = time.perf_counter()
        with self._lock:
            self._waited += end - begin
        if self.trace is not None:
            self.span(WAITS[copy.kind], copy, begin, end)

    def span(self, kind: SpanKind, copy: Copy, begin: float, end: float) -> None:
        """Something of a copy has ended."""
        if self.trace is not None:
            lease, offset, nbytes = copy.lease, copy.offset, copy.nbytes
            self.add(Span(kind=kind, lease=lease, offset=offset, nbytes=nbytes, begin=begin, end=end))

    def add(self, span: Span) -> None:
        """Put a span on the trace, while one is asked for."""
        with self._lock:
            if self.trace is not None:
                self.trace.append(span)


class Engine(ABC):
    """Asynchronous copies between one device and host leases. Safe to use from several threads.

    A lease is known by its address: what autograd's hooks cloned is another lease, with nothing under way.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or Recorder()
        # Reentrant: a user's destructor may call while this thread is inside.
        self._lock = threading.RLock()
        self._pending: dict[Key, Copy] = {}
        self._offloaded: dict[tuple[int, int], Copy] = {}
        self._last_read: dict[int, Copy] = {}

    # What the ops call.

    def offload(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """Start to copy `src` to the lease's bytes from `offset` on, once `src` has been produced."""
        self._await_producer()
        self._begin(Direction.D2H, src, lease, offset)

    def offload_wait(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """From here on the computation may write where `src` lies."""
        self._end(Direction.D2H, src, lease, offset)

    def prefetch(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """Start to copy the lease's bytes to `dst`, once the computation has passed the last reader of that place."""
        self._await_readers()
        self._begin(Direction.H2D, dst, lease, offset)

    def prefetch_wait(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """From here on the computation may read `dst`."""
        self._end(Direction.H2D, dst, lease, offset)

    # What the host side calls.

    def is_prefetching(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> bool:
        """Whether a prefetch of just this was started and not yet waited for."""
        with self._lock:
            return key_of(Direction.H2D, dst, lease, offset) in self._pending

    def discard(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """Wait for a prefetch that nobody will ask for, and forget it: `dst` may go."""
        with self._lock:
            copy = self._pending.get(key_of(Direction.H2D, dst, lease, offset))
        self._drop([copy] if copy is not None else [])

    def spare(self, nbytes: int, device: torch.device) -> torch.Tensor | None:
        """A storage for what could wait, None where there is no room without an effort."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError:
            return None

    @property
    def pending(self) -> int:
        """Copies that were started and not waited for."""
        return len(self._pending)

    def abandon(self) -> None:
        """Wait for the copies that a failed call of this thread left behind, and forget them."""
        me = threading.get_ident()
        with self._lock:
            pending = [c for c in self._pending.values() if c.thread == me]
        self._drop(pending)

    def forget_lease(self, lease: int) -> None:
        """Nothing refers to a lease any more, so that nobody will wait for its copies."""
        with self._lock:
            pending = [c for c in self._pending.values() if c.lease == lease]
            for copy in pending:
                del self._pending[copy.key]
        for copy in pending:
            self._let_go(copy)

    def drain(self) -> None:
        """Wait for every copy that was started, and forget it."""
        with self._lock:
            pending = list(self._pending.values())
        self._drop(pending)

    def forget_block(self, lease: int) -> None:
        """Before a block of host memory goes to the system or another device: no copy may touch it any more."""
        with self._lock:
            if lease not in self._last_read and all(address != lease for address, _ in self._offloaded):
                return
            copies = [c for (address, _), c in self._offloaded.items() if address == lease]
            copies += [c for c in (self._last_read.pop(lease, None),) if c is not None]
            self._offloaded = {k: c for k, c in self._offloaded.items() if k[0] != lease}
        for copy in copies:
            self._join(copy)

    def finish_offloads(self) -> None:
        """The host itself is about to read leases (hooks that clone): wait until what was offloaded is there."""
        with self._lock:
            copies = list(self._offloaded.values())
        for copy in copies:
            self._join(copy)

    # What must wait for what.

    def _await_producer(self) -> None:
        """An offload starts when what the computation was given so far, its source's producer included, is done."""
        self._queue_after_computation(Direction.D2H)

    def _await_readers(self) -> None:
        """A prefetch lands when what the computation has been given so far, the place's readers included, is done."""
        self._queue_after_computation(Direction.H2D)

    def _offload_of(self, prefetch: Copy) -> Copy | None:
        """A prefetch waits for the offload of its own slice."""
        return self._offloaded.get((prefetch.lease, prefetch.offset))

    def _readers_of_block(self, offload: Copy) -> Copy | None:
        """A block that was given back is leased again at once: what still reads it goes first."""
        return self._last_read.get(offload.lease)

    # How: threads and streams differ.

    @abstractmethod
    def computation(self) -> int:
        """Names the queue that the computation of this thread runs on now."""

    @abstractmethod
    def _queue_after_computation(self, kind: Direction) -> None:
        """The next copy of this kind starts after what the computation has been given so far."""

    @abstractmethod
    def _copy(self, kind: Direction, lease: int, offset: int, device: int, nbytes: int, thread: int) -> Copy:
        """A copy of this engine's, not launched yet."""

    @abstractmethod
    def _launch(self, copy: Copy, device: torch.Tensor, lease: torch.Tensor, after: Copy | None) -> None:
        """Start a copy between a value on the device and its place in a lease, after `after`.

        From here on the copy keeps both sides alive until it has ended.
        """

    @abstractmethod
    def _finish(self, kind: Direction) -> None:
        """The host waits until all that was queued this way has ended, well or not. Raises nothing."""

    @abstractmethod
    def _order(self, copy: Copy) -> None:
        """Put the computation after a copy.

        Raises:
            TransferFailed: it failed.
        """

    @abstractmethod
    def _join(self, copy: Copy) -> None:
        """The host waits until a copy has ended, well or not."""

    @abstractmethod
    def _let_go(self, copy: Copy) -> None:
        """The lease of a copy is gone: before its device side is freed, the copy must have ended."""

    # Bookkeeping.

    def _begin(self, kind: Direction, device: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        sides = lease.data_ptr(), offset, device.data_ptr()
        copy = self._copy(kind, *sides, device.nbytes, threading.get_ident())
        key = copy.key
        stale = self._pending.get(key)
        if stale is not None:
            self._drop([stale])
        try:
            # One step for other threads: who sees a copy can wait for it, and the last read is the last.
            with self._lock:
                self._launch(copy, device, lease, self._before(copy))
                self._pending[key] = copy
                self._remember(copy)
        except BaseException:  # failed or interrupted half-way: what was queued of it still copies
            self._finish(kind)
            raise
        self.recorder.started(copy)

    def _before(self, copy: Copy) -> Copy | None:
        return self._readers_of_block(copy) if copy.kind is Direction.D2H else self._offload_of(copy)

    def _remember(self, started: Copy) -> None:
        if started.kind is Direction.D2H:
            self._offloaded[started.lease, started.offset] = started
        else:
            self._last_read[started.lease] = started

    def _end(self, kind: Direction, device: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        key = key_of(kind, device, lease, offset)
        copy = self._pending.get(key)
        if copy is None:
            raise TransferFailed(
                f"a wait for a {kind} copy of {device.nbytes} bytes at host offset {offset} that was never started"
            )
        begin = time.perf_counter()
        try:
            self._order(copy)
        except BaseException:  # failed or interrupted: nothing may be left that still copies
            self._drop([copy])
            raise
        with self._lock:
            self._pending.pop(key, None)
        self.recorder.waited(copy, begin)

    def _drop(self, copies: list[Copy]) -> None:
        for copy in copies:
            self._join(copy)
            with self._lock:
                if self._pending.get(copy.key) is copy:
                    del self._pending[copy.key]


def key_of(kind: Direction, device: torch.Tensor, lease: torch.Tensor, offset: int) -> Key:
    """What a wait for a copy between `device` and its place in `lease` names."""
    return (kind, lease.data_ptr(), offset, device.data_ptr())


def host_view(lease: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """The lease's bytes from `offset` on as a dense tensor of the shape and dtype of `like`.

    Host bytes hold a value in row-major order, whatever strides it has on the device.
    """
    return lease[offset : offset + like.nbytes].view(like.dtype).view_as(like)
