"""Prefetches across calls: while one backward runs, the slices of the call before it are already on their way.

A model whose blocks are compiled alone calls one compiled forward for each block, and then their backwards in reverse.
Within one backward nothing can start before it begins. So leases are remembered in the order of their forwards, and
once a backward has started the last of its own prefetches, those of the lease made just before it begin, in prefetch
places that their backward takes over. Nothing relies on it: a backward that finds nothing started starts it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memo_compile.logs import logger
from memo_compile.runtime.engine import Engine
from memo_compile.runtime.poison import poison

log = logger(__name__)


@dataclass(frozen=True)
class EarlyPrefetch:
    """Where one slice lands: a view (dtype, shape, stride, start in elements) of a storage of `nbytes` bytes.

    `offset` is the slice's place in the host lease, `buffer` the name in the emitted code.
    """

    buffer: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Schedule:
    """What a compiled backward prefetches: `early` may begin before it does, `count` is how many there are in all.

    With `poison` prefetch buffers are filled when they are taken.
    """

    early: tuple[EarlyPrefetch, ...]
    count: int
    poison: bool = False


@dataclass(eq=False)
class _Call:
    lease: int
    serial: int
    thread: int
    schedule: Schedule
    remaining: int
    began: bool = False
    starting: bool = False
    computation: int = 0
    started: dict[int, torch.Tensor] = field(default_factory=dict)


class CrossCallPrefetch:
    """The outstanding calls of one device. `borrow` gives the lease at an address, None where it is gone."""

    def __init__(self, engine: Engine, device: torch.device, borrow: Callable[[int], torch.Tensor | None]) -> None:
        self._engine, self._device, self._borrow = engine, device, borrow
        # Reentrant: a user's destructor may call while this thread is inside.
        self._lock = threading.RLock()
        self._calls: dict[int, _Call] = {}
        self._serial = 0

    def made(self, lease: torch.Tensor, schedule: Schedule) -> None:
        """A forward has ended and left `lease` for its backward."""
        with self._lock:
            self._serial += 1
            me = threading.get_ident()
            address = lease.data_ptr()
            self._calls[address] = _Call(address, self._serial, me, schedule, schedule.count)

    def begins(self, lease: torch.Tensor) -> None:
        """The backward of `lease` begins. Where all of it is on its way already, the lease before follows at once."""
        with self._lock:
            call = self._calls.get(lease.data_ptr())
            if call is None or call.began:
                return
            call.began = True
            all_started = len(call.started) == call.schedule.count
        if all_started:
            self._start_before(call)

    def adopt(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> bool:
        """Whether the prefetch that a backward asks for is under way already, and to the same place."""
        with self._lock:
            call = self._calls.get(lease.data_ptr())
            base = call.started.pop(offset, None) if call is not None else None
        return base is not None and self._engine.is_prefetching(dst, lease, offset)

    def passed(self, lease: torch.Tensor) -> None:
        """A backward has started one of its prefetches; after the last the link is free for the lease before."""
        with self._lock:
            call = self._calls.get(lease.data_ptr())
            if call is None or not call.began:
                return
            call.remaining -= 1
            last = call.remaining == 0
            if last:  # a second backward finds nothing started, and a captured lease is never given back
                del self._calls[lease.data_ptr()]
        if last:
            self._start_before(call)

    def place(self, lease: torch.Tensor, offset: int) -> torch.Tensor | None:
        """The storage in which a slice lands already, None where it was not started by the stream that asks."""
        with self._lock:
            call = self._calls.get(lease.data_ptr())
            if call is None or call.computation != self._engine.computation():
                return None
            return call.started.get(offset)

    def forget(self, lease: int) -> None:
        """A lease is gone, and with it what was started for it."""
        with self._lock:
            self._calls.pop(lease, None)

    @property
    def outstanding(self) -> int:
        """Calls whose lease is still there, and whose backward has prefetches to start."""
        return len(self._calls)

    def _start_before(self, call: _Call) -> None:
        with self._lock:
            before = [c for c in self._calls.values() if c.serial < call.serial and c.thread == call.thread]
            previous = max(before, key=lambda c: c.serial, default=None)
            if previous is None or previous.began or previous.started or previous.starting:
                return
            lease = self._borrow(previous.lease)
            if lease is None:
                return
            previous.starting = True
            previous.computation = self._engine.computation()
        try:
            for prefetch in previous.schedule.early:
                if not self._start(previous, prefetch, lease):
                    return
        finally:
            previous.starting = False

    def _start(self, call: _Call, prefetch: EarlyPrefetch, lease: torch.Tensor) -> bool:
        """Whether a slice is on its way for a backward that has not begun."""
        base = self._engine.spare(prefetch.nbytes, self._device)
        if base is None:  # no room now: its own backward will start it
            log.debug("no room to prefetch early: %d bytes", prefetch.nbytes)
            return False
        if call.schedule.poison:
            poison(base)
        dst = base.view(prefetch.dtype).as_strided(prefetch.shape, prefetch.stride, prefetch.start)
        self._engine.prefetch(dst, lease, prefetch.offset)
        with self._lock:
            if not call.began:
                call.started[prefetch.offset] = base
                return True
        self._engine.discard(dst, lease, prefetch.offset)  # begun meanwhile, and started in a place of its own
        return False
