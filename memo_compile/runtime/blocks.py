"""Blocks of host memory: private anonymous mappings, registered for DMA where a GPU is going to copy them.

A forked child finds its copy of a mapping empty (MADV_WIPEONFORK, Linux 4.14): it holds none of its parent's bytes, the
parent's pages are not copied when either writes, and what is registered stays where the GPU looks for it. With
MADV_DONTFORK the child would have no mapping at all, so that a stray read ends it, and the mapping object that it
inherits unmaps whatever lies at that address by then.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass

import numpy as np
import torch

from memo_compile.runtime import cudart
from memo_compile.runtime.numa import bind_to_node, node_of_device

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, asm-generic/mman-common.h; Python's mmap does not name it
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True, eq=False)
class Block:
    """One mapping of `nbytes` bytes for copies from and to devices of type `kind`.

    `refused` is the CUDA error with which page-locking was refused, 0 where it was not, or not asked for.
    """

    memory: mmap.mmap
    address: int
    nbytes: int
    kind: str
    refused: int

    @property
    def pinned(self) -> bool:
        """Whether it is registered for DMA."""
        return self.kind == "cuda" and bool(self.nbytes) and not self.refused


def map_block(nbytes: int, device: torch.device) -> Block:
    """A new block. Nothing of CUDA is touched unless `device` is a GPU.

    Raises:
        OSError, ValueError, OverflowError: the system refuses.
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(memory, nbytes)
    address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
    refused = 0
    if device.type == "cuda" and nbytes:
        bind_to_node(address, nbytes, node_of_device(device))
        refused = cudart.page_lock(address, nbytes)
    return Block(memory, address, nbytes, device.type, refused)


def _advise(memory: mmap.mmap, nbytes: int) -> None:
    for advice in (_WIPE_ON_FORK, *((mmap.MADV_HUGEPAGE,) if nbytes >= _HUGE_PAGE else ())):
        with contextlib.suppress(OSError):  # an older kernel, or one without: the child then has copies of its own
            memory.madvise(advice)


def unlock(block: Block) -> None:
    """Before a block goes. The mapping goes with its last reference: a view that is being collected may export it."""
    if block.pinned:
        cudart.page_unlock(block.address)
