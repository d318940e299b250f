"""The host arena: exact-size blocks outside torch's allocator, leased to one call and used again by the next.

A lease is a uint8 tensor over a block. It is free when the last reference to its storage is gone, whether a backward
ran or not; the block then waits for the next call of the same size. Blocks are anonymous mappings, so that their bytes
are exact, on the GPU's own NUMA node where there are several, and registered for DMA where there is a GPU.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memo_compile.errors import HostBudgetExceeded, HostMemoryUnavailable
from memo_compile.hardware.profiles import free_host_memory
from memo_compile.logs import logger
from memo_compile.runtime.numa import bind_to_node, node_of_device

log = logger(__name__)

NO_LIMIT = -1  # a budget that limits nothing


@dataclass(frozen=True)
class Block:
    """One mapping of `nbytes` bytes; `pinned` tells whether it is registered for DMA."""

    memory: mmap.mmap
    nbytes: int
    pinned: bool


def _nothing(address: int) -> None:
    pass


class HostPool:
    """Leases blocks, keeps idle ones, and counts both. Safe to use from several threads.

    `on_return` is called with the address of a lease that is gone, `before_free` with that of a block that is about to
    go back to the system.
    """

    def __init__(
        self, on_return: Callable[[int], None] = _nothing, before_free: Callable[[int], None] = _nothing
    ) -> None:
        # Reentrant: a lease may be collected, and so given back, while this thread is inside.
        self._lock = threading.RLock()
        self._on_return, self._before_free = on_return, before_free
        self._idle: dict[int, list[Block]] = defaultdict(list)
        self._views: dict[int, weakref.ref[np.ndarray[Any, Any]]] = {}
        self._captured: list[np.ndarray[Any, Any]] = []
        self._held = 0
        self._leased = 0
        self._generation = 0
        self._warned = False

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks, idle ones included."""
        return self._held

    @property
    def leased_bytes(self) -> int:
        """Bytes of blocks that some call still holds."""
        return self._leased

    def lease(self, nbytes: int, budget: int = NO_LIMIT) -> torch.Tensor:
        """A uint8 tensor of `nbytes` bytes in host memory.

        Raises:
            HostBudgetExceeded: all blocks together would exceed `budget` bytes.
            HostMemoryUnavailable: the system has not so much.
        """
        with self._lock:
            block = self._idle[nbytes].pop() if self._idle[nbytes] else self._grow(nbytes, budget)
            self._leased += nbytes
            generation = self._generation
            view = np.frombuffer(block.memory, dtype=np.uint8, count=nbytes)
            self._views[_address(block.memory)] = weakref.ref(view)
        weakref.finalize(view, self._give_back, block, generation).atexit = False
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._captured.append(view)  # the graph's replays use this block for as long as they run
        return torch.from_numpy(view)

    def borrow(self, address: int) -> torch.Tensor | None:
        """The lease at an address, None where nothing refers to one any more."""
        with self._lock:
            reference = self._views.get(address)
        view = reference() if reference is not None else None
        return torch.from_numpy(view) if view is not None else None

    def _grow(self, nbytes: int, budget: int) -> Block:
        if budget != NO_LIMIT and self._held + nbytes > budget:
            self.drop_idle()
            if self._held + nbytes > budget:
                raise HostBudgetExceeded(nbytes, self._held, budget)
        if nbytes > free_host_memory():
            self.drop_idle()
        available = free_host_memory()
        if nbytes > available:
            raise HostMemoryUnavailable(nbytes, available)
        try:
            memory = mmap.mmap(-1, max(nbytes, 1))
        except (OSError, ValueError, OverflowError) as error:
            raise HostMemoryUnavailable(nbytes, available) from error
        bind_to_node(_address(memory), nbytes, node_of_device())
        pinned = self._page_lock(memory, nbytes)
        self._held += nbytes
        return Block(memory, nbytes, pinned)

    def _page_lock(self, memory: mmap.mmap, nbytes: int) -> bool:
        """Register a block for DMA where there is a GPU; pageable, with one warning, where that is refused."""
        if not torch.cuda.is_available() or not nbytes:
            return False
        cudart: Any = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(_address(memory), nbytes, 0))
        if error and not self._warned:
            self._warned = True
            log.warning(
                "host memory of %d bytes could not be page-locked (CUDA error %d): copies will be slower and will not "
                "overlap. Raise the locked-memory limit (ulimit -l), or lower host_budget.",
                nbytes,
                error,
            )
        return not error

    def _give_back(self, block: Block, generation: int) -> None:
        address = _address(block.memory)
        self._on_return(address)
        with self._lock:
            self._views.pop(address, None)
            self._leased -= block.nbytes
            if generation == self._generation:
                self._idle[block.nbytes].append(block)
            else:
                self._free(block)

    def drop_idle(self) -> None:
        """Return the idle blocks to the system."""
        with self._lock:
            for blocks in self._idle.values():
                for block in blocks:
                    self._free(block)
            self._idle.clear()

    def reset(self) -> None:
        """Return the idle blocks to the system, and those that are leased as soon as they are given back."""
        with self._lock:
            self._generation += 1
            self._captured.clear()
            self.drop_idle()

    def _free(self, block: Block) -> None:
        self._before_free(_address(block.memory))
        self._held -= block.nbytes
        if block.pinned:
            torch.cuda.cudart().cudaHostUnregister(_address(block.memory))
        # The mapping itself goes with its last reference: a view that is just being collected may still export it.


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
