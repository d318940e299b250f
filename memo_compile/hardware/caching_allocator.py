"""What torch's CUDA allocator reserves for a series of allocations: its rules, played without a device.

Rules of `c10/cuda/CUDACachingAllocator.cpp`, torch 2.11 to 2.15, at its default settings: sizes are rounded up to 512
bytes; up to 1 MiB they lie in segments of 2 MiB, below 10 MiB in such of 20 MiB, above in one of their own, rounded up
to 2 MiB. A request is given the smallest free block that holds it, which is split, and a freed block joins its free
neighbours. With `expandable_segments` there is one segment for small and one for large, which grows at its end by pages
of 2 and 20 MiB. Nothing goes back to the device. `tests/gpu/test_allocator.py` holds this against a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memo_compile.placement.problem import aligned

Life = tuple[int, int, int]  # the first step, one past the last, bytes

ROUNDING = 512
SMALL, SMALL_SEGMENT = 2**20, 2 * 2**20
LARGE_FROM, LARGE_SEGMENT, LARGE_ROUNDING = 10 * 2**20, 20 * 2**20, 2 * 2**20
ROUNDS = 3  # of a step, after which what is reserved has come to rest


def reserved(lives: Sequence[Life], *, expandable: bool, rounds: int = ROUNDS) -> int:
    """The most bytes reserved when storages with these lives come and go, step by step, several times over.

    The allocator begins empty. What is alive to the end goes before the next round.
    """
    pool = Pools(expandable)
    for _ in range(rounds):
        held: dict[int, _Block] = {}
        for alive, index in _events(lives):
            if alive:
                held[index] = pool.allocate(lives[index][2])
            else:
                pool.free(held.pop(index))
    return pool.reserved


def _events(lives: Sequence[Life]) -> list[tuple[bool, int]]:
    """Births and deaths in their order; of one step deaths first."""
    births = [(start, 1, i) for i, (start, end, size) in enumerate(lives) if start < end and size]
    deaths = [(end, 0, i) for i, (start, end, size) in enumerate(lives) if start < end and size]
    return [(bool(kind), i) for _, kind, i in sorted(births + deaths)]


@dataclass(eq=False)
class _Block:
    segment: _Segment
    size: int
    free: bool = True


@dataclass(eq=False)
class _Segment:
    """Neighbouring blocks. One that `grows` has addresses beyond its last."""

    page: int
    grows: bool
    blocks: list[_Block] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(b.size for b in self.blocks)

    def grow(self, size: int) -> _Block:
        """Make the last block free, and at least so large."""
        if not self.blocks or not self.blocks[-1].free:
            self.blocks.append(_Block(self, 0))
        last = self.blocks[-1]
        last.size += aligned(max(0, size - last.size), self.page)
        return last

    def take(self, block: _Block, size: int, rest: int) -> None:
        """Use a free block, without what is left of it where that is `rest` or more."""
        over = block.size - size
        block.free = False
        if over >= rest:
            block.size = size
            self.blocks.insert(self.blocks.index(block) + 1, _Block(self, over))

    def give_back(self, block: _Block) -> None:
        """Free a block and join it with its free neighbours."""
        at = self.blocks.index(block)
        block.free = True
        for neighbour in (at + 1, at - 1):
            if 0 <= neighbour < len(self.blocks) and self.blocks[neighbour].free:
                block.size += self.blocks[neighbour].size
                self.blocks[neighbour].size = 0
        self.blocks[:] = [b for b in self.blocks if b.size]


class Pools:
    """The allocator's two pools, and what each has reserved."""

    def __init__(self, expandable: bool) -> None:
        self._expandable = expandable
        self._segments: dict[bool, list[_Segment]] = {True: [], False: []}  # small ones, large ones
        if expandable:
            self._segments = {True: [_Segment(SMALL_SEGMENT, True)], False: [_Segment(LARGE_SEGMENT, True)]}

    @property
    def reserved(self) -> int:
        """Bytes that the device has handed out."""
        return sum(s.size for segments in self._segments.values() for s in segments)

    def allocate(self, nbytes: int) -> _Block:
        """A block for so many bytes."""
        size = max(ROUNDING, aligned(nbytes, ROUNDING))
        small = size <= SMALL
        block = self._fitting(small, size) or self._more(small, size)
        splits_any = small or self._expandable
        block.segment.take(block, size, ROUNDING if splits_any else SMALL + 1)
        return block

    def free(self, block: _Block) -> None:
        """Give a block back."""
        block.segment.give_back(block)

    def _fitting(self, small: bool, size: int) -> _Block | None:
        """The smallest free block that holds it; one that can grow counts as the largest."""
        found = [b for s in self._segments[small] for b in s.blocks if b.free and b.size >= size]
        return min(found, key=lambda b: (b.segment.grows and b is b.segment.blocks[-1], b.size), default=None)

    def _more(self, small: bool, size: int) -> _Block:
        if self._expandable:
            return self._segments[small][0].grow(size)
        segment = _Segment(0, False)
        segment.blocks.append(_Block(segment, segment_bytes(size)))
        self._segments[small].append(segment)
        return segment.blocks[0]


def segment_bytes(size: int) -> int:
    """What is asked of the device for a request that no free block holds.

    >>> segment_bytes(512), segment_bytes(2**20 + 512), segment_bytes(11 * 2**20)
    (2097152, 20971520, 12582912)
    """
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE_FROM else aligned(size, LARGE_ROUNDING)
