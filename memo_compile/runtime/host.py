"""The host arena: blocks outside torch's allocator, leased to one call and used again by the next.

A lease is a uint8 tensor over a block. It is free when the last reference to its storage is gone, whether a backward
ran or not; the block then waits for the next call that it fits. What is collected may be so at any moment, in any
thread, with any lock held: it leaves a note, and the next call does what there is to do.

A block serves any request of at least a quarter of its size. A request that none serves gets a block of its size, and
as many idle bytes that are too small for it go back to the system. So among blocks of one call at a time each is less
than a quarter of the next: lengths that vary hold at most a third more than the longest needs.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from memo_compile.errors import HostBudgetExceeded, HostMemoryUnavailable, LeaseOfAnotherProcess
from memo_compile.hardware.host_memory import free_host_memory
from memo_compile.logs import logger
from memo_compile.runtime.blocks import Block, map_block, unlock

log = logger(__name__)

NO_LIMIT = -1  # a budget that limits nothing
WASTE = 4  # a block serves requests down to its size divided by this
ROUND = 1000  # leases: what was not used in so many goes back to the system
CPU = torch.device("cpu")

View = np.ndarray[Any, Any]


def _nothing(address: int) -> None:
    pass


class HostPool:
    """Leases blocks, keeps idle ones, and counts both. Safe to use from several threads.

    `on_return` is called with the address of a lease that is gone, `before_free` with that of a block that is about to
    go back to the system; neither with a lock held.
    """

    def __init__(
        self, on_return: Callable[[int], None] = _nothing, before_free: Callable[[int], None] = _nothing
    ) -> None:
        self._lock = threading.RLock()  # reentrant: a user's destructor may call, while this thread is inside
        self._on_return, self._before_free = on_return, before_free
        self._idle: list[tuple[Block, int]] = []  # and the serial of its last lease, oldest first
        self._returned: deque[tuple[Block, int]] = deque()  # and the generation in which it was leased: the notes
        self._leaving: deque[Block] = deque()
        self._views: dict[int, weakref.ref[View]] = {}
        self._foreign: dict[int, weakref.ref[View]] = {}
        self._captured: list[View] = []
        self._held = self._leased = self._serial = self._generation = 0
        self._warned = False

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks, idle ones included."""
        self.reclaim()
        return self._held

    @property
    def leased_bytes(self) -> int:
        """Bytes of blocks that some call still holds."""
        self.reclaim()
        return self._leased

    def lease(self, nbytes: int, budget: int = NO_LIMIT, device: torch.device = CPU) -> torch.Tensor:
        """A uint8 tensor of `nbytes` bytes in host memory, page-locked where `device` is a GPU.

        Raises:
            HostBudgetExceeded: all blocks together would exceed `budget` bytes.
            HostMemoryUnavailable: the system has not so much.
        """
        self.reclaim()
        with self._lock:
            self._serial += 1
            self._age()
            block = self._reuse(nbytes, budget, device.type)
        self._release()
        if block is None:
            block = self._grow(nbytes, budget, device)
        return self._hand_over(block, nbytes)

    def borrow(self, address: int) -> torch.Tensor | None:
        """The lease at an address, None where nothing refers to one any more."""
        with self._lock:
            reference = self._views.get(address)
        view = reference() if reference is not None else None
        return torch.from_numpy(view) if view is not None else None

    def reclaim(self) -> None:
        """Take back what was collected since the last call."""
        while self._returned:
            try:
                block, generation = self._returned.popleft()
            except IndexError:  # another thread took it
                break
            try:
                self._on_return(block.address)
            finally:
                self._take_back(block, generation)
        self._release()

    def drop_idle(self) -> None:
        """Return the idle blocks to the system."""
        self.reclaim()
        with self._lock:
            self._shrink(0)
        self._release()

    def reset(self) -> None:
        """Return the idle blocks to the system, and those that are leased as soon as they are given back.

        What a CUDA graph has captured stays: its replays use the block, and nobody says when it is gone.
        """
        with self._lock:
            self._generation += 1
        self.drop_idle()

    # What a forked child must not touch.

    def disown(self, parents: HostPool) -> None:
        """In a forked child: leases of its parent's pool hold nothing here. No lock of the parent's is asked for."""
        self._foreign = {**parents._foreign, **parents._views}

    def check_own(self, lease: torch.Tensor) -> None:
        """Refuse a lease whose bytes stayed in another process.

        Raises:
            LeaseOfAnotherProcess: its forward ran before this process was forked.
        """
        if self._foreign:
            reference = self._foreign.get(lease.data_ptr())
            if reference is not None and reference() is not None:  # else the address is another's by now
                raise LeaseOfAnotherProcess(lease.numel())

    # How blocks come and go. What is below `_grow` and `_hand_over` is called with the lock held.

    def _grow(self, nbytes: int, budget: int, device: torch.device) -> Block:
        """A block where no idle one fits: a larger one where there is no room, else a new one for smaller ones."""
        try:
            with self._lock:
                larger = self._take(self._fitting(nbytes, device.type)) if self._short(nbytes, budget) else None
                if larger is not None:
                    return larger
                self._trade(nbytes, device.type)
                self._make_room(nbytes, budget)
                self._held += nbytes
        finally:
            self._release()
        try:
            return self._mapped(nbytes, device)
        except BaseException:
            with self._lock:
                self._held -= nbytes
            raise

    def _mapped(self, nbytes: int, device: torch.device) -> Block:
        """Without the lock: page-locking takes seconds."""
        available = free_host_memory()
        if nbytes > available:
            raise HostMemoryUnavailable(nbytes, available)
        try:
            block = map_block(nbytes, device)
        except (OSError, ValueError, OverflowError) as error:
            raise HostMemoryUnavailable(nbytes, available) from error
        self._warn_once(block)
        return block

    def _hand_over(self, block: Block, nbytes: int) -> torch.Tensor:
        view = np.frombuffer(block.memory, dtype=np.uint8, count=nbytes)
        captured = block.kind == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            self._views[block.address] = weakref.ref(view)
            if captured:  # the graph's, for as long as it is replayed
                self._captured.append(view)
            else:
                self._leased += block.nbytes
                # A finalizer takes no lock and calls nobody: appending is one step.
                weakref.finalize(view, self._returned.append, (block, self._generation)).atexit = False
        return torch.from_numpy(view)

    def _take_back(self, block: Block, generation: int) -> None:
        with self._lock:
            self._views.pop(block.address, None)
            self._leased -= block.nbytes
            if generation == self._generation:
                self._idle.append((block, self._serial))
            else:
                self._leave(block)

    def _fitting(self, nbytes: int, kind: str, most: int | None = None) -> Block | None:
        """The smallest idle block of at least `nbytes` bytes, and at most `most`; of its like the last one used."""
        blocks = (b for b, _ in reversed(self._idle) if b.kind == kind and b.nbytes >= nbytes)
        best = min(blocks, key=lambda b: b.nbytes, default=None)
        return best if best is not None and (most is None or best.nbytes <= most) else None

    def _take(self, block: Block | None) -> Block | None:
        self._idle = [entry for entry in self._idle if entry[0] is not block]
        return block

    def _reuse(self, nbytes: int, budget: int, kind: str) -> Block | None:
        """An idle block, unless a new one of the very size keeps the budget and this one does not."""
        block = self._take(self._fitting(nbytes, kind, WASTE * nbytes))
        if block is not None and budget != NO_LIMIT:
            self._shrink(budget)
            if self._held > budget >= self._held - block.nbytes + nbytes:
                self._leave(block)
                return None
        return block

    def _short(self, nbytes: int, budget: int) -> bool:
        """Whether a larger idle block is better than a new one: that would be too much, and what is there is not."""
        limit = self._held + nbytes if budget == NO_LIMIT else budget
        return self._held <= limit and (self._held + nbytes > limit or nbytes > free_host_memory())

    def _trade(self, nbytes: int, kind: str) -> None:
        """Give back idle blocks that were too small, up to the bytes that the new one takes."""
        remaining = nbytes
        for block in sorted((b for b, _ in self._idle), key=lambda b: -b.nbytes):
            if block.kind == kind and block.nbytes < nbytes and block.nbytes <= remaining:
                remaining -= block.nbytes
                self._leave(block)

    def _make_room(self, nbytes: int, budget: int) -> None:
        """Give back idle blocks until `nbytes` more are allowed, by the budget and by the system."""
        if budget != NO_LIMIT:
            self._shrink(budget - nbytes)
            if self._held + nbytes > budget:
                raise HostBudgetExceeded(nbytes, self._held, budget)
        self._shrink(self._held - max(0, nbytes - free_host_memory()))

    def _shrink(self, most: int) -> None:
        """Give back idle blocks, the longest unused first, until `most` bytes are held or none is idle."""
        for block, _ in list(self._idle):
            if self._held > most:
                self._leave(block)

    def _age(self) -> None:
        if self._serial % ROUND == 0:
            for block, used in list(self._idle):
                if used <= self._serial - ROUND:
                    self._leave(block)

    def _leave(self, block: Block) -> None:
        self._take(block)
        self._held -= block.nbytes
        self._leaving.append(block)

    def _release(self) -> None:
        """Without the lock: give blocks that leave to the system, when no copy touches them any more."""
        while self._leaving:
            try:
                block = self._leaving.popleft()
            except IndexError:  # another thread took it
                return
            self._before_free(block.address)
            unlock(block)

    def _warn_once(self, block: Block) -> None:
        if block.refused and not self._warned:
            self._warned = True
            log.warning(
                "host memory of %d bytes could not be page-locked (CUDA error %d): copies will be slower and will not "
                "overlap. Raise the locked-memory limit (ulimit -l), or lower host_budget.",
                *(block.nbytes, block.refused),
            )
