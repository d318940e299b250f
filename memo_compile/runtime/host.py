"""The host arena: exact-size blocks outside torch's allocator, leased to one call and used again by the next.

A lease is a uint8 tensor over a block. It is free when the last reference to its storage is gone, whether a backward
ran or not; the block then waits for the next call of the same size. Blocks are anonymous mappings, so that their bytes
are exact, and registered for DMA where there is a GPU.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memo_compile.errors import HostBudgetExceeded
from memo_compile.logs import logger

log = logger(__name__)

NO_LIMIT = -1  # a budget that limits nothing


@dataclass(frozen=True)
class Block:
    """One mapping of `nbytes` bytes; `pinned` tells whether it is registered for DMA."""

    memory: mmap.mmap
    nbytes: int
    pinned: bool


class HostPool:
    """Leases blocks, keeps idle ones, and counts both. Safe to use from several threads."""

    def __init__(self) -> None:
        # Reentrant: a lease may be collected, and so given back, while this thread is inside.
        self._lock = threading.RLock()
        self._idle: dict[int, list[Block]] = defaultdict(list)
        self._held = 0
        self._leased = 0
        self._generation = 0

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
        """
        with self._lock:
            block = self._idle[nbytes].pop() if self._idle[nbytes] else self._grow(nbytes, budget)
            self._leased += nbytes
            generation = self._generation
        view = np.frombuffer(block.memory, dtype=np.uint8)
        weakref.finalize(view, self._give_back, block, generation).atexit = False
        return torch.from_numpy(view)

    def _grow(self, nbytes: int, budget: int) -> Block:
        if budget != NO_LIMIT and self._held + nbytes > budget:
            self.drop_idle()
            if self._held + nbytes > budget:
                raise HostBudgetExceeded(nbytes, self._held, budget)
        try:
            memory = mmap.mmap(-1, max(nbytes, 1))
        except (OSError, ValueError) as error:
            self.drop_idle()
            raise HostBudgetExceeded(nbytes, self._held, self._held) from error
        self._held += nbytes
        return Block(memory, nbytes, _register(memory, nbytes))

    def _give_back(self, block: Block, generation: int) -> None:
        with self._lock:
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
            self.drop_idle()

    def _free(self, block: Block) -> None:
        self._held -= block.nbytes
        if block.pinned:
            torch.cuda.cudart().cudaHostUnregister(_address(block.memory))
        # The mapping itself goes with its last reference: a view that is just being collected may still export it.


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


def _register(memory: mmap.mmap, nbytes: int) -> bool:
    """Page-lock a block where there is a GPU; pageable, with a warning, where that is refused."""
    if not torch.cuda.is_available() or not nbytes:
        return False
    cudart: Any = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(_address(memory), nbytes, 0))
    if error:
        log.warning(
            "host memory of %d bytes could not be page-locked (CUDA error %d): copies will be slower and will not "
            "overlap. Raise the locked-memory limit (ulimit -l), or lower host_budget.",
            nbytes,
            error,
        )
    return not error
