"""Checks a placement, knowing nothing of how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memo_compile.errors import PlacementOverlap
from memo_compile.placement.problem import Buffer, Placement


def verify(buffers: Sequence[Buffer], placement: Placement | Mapping[str, int]) -> None:
    """Check that no two buffers that live at the same time share a byte, and that all lie within the peak.

    Args:
        buffers: what was to be placed.
        placement: the answer, or offsets by name.

    Raises:
        PlacementOverlap: names the two buffers, or the one that has no place or lies outside.
    """
    offsets = placement.offsets if isinstance(placement, Placement) else placement
    for b in buffers:
        if b.name not in offsets or offsets[b.name] < 0:
            raise PlacementOverlap(f"buffer {b.name!r} has no offset, or a negative one")
        if isinstance(placement, Placement) and offsets[b.name] + b.size > placement.peak:
            raise PlacementOverlap(f"buffer {b.name!r} ends at {offsets[b.name] + b.size}, above {placement.peak}")
    live: list[Buffer] = []
    for b in sorted(buffers, key=lambda b: b.start):
        live = [other for other in live if other.end > b.start]
        for other in live:
            if _root(b, buffers) != _root(other, buffers) and _share(offsets[b.name], b, offsets[other.name], other):
                raise PlacementOverlap(
                    f"buffers {other.name!r} at {offsets[other.name]} and {b.name!r} at {offsets[b.name]} "
                    f"share bytes from step {b.start} to {min(b.end, other.end)}"
                )
        live.append(b)


def _root(b: Buffer, buffers: Sequence[Buffer]) -> str:
    return b.alias if b.alias is not None else b.name


def _share(low: int, b: Buffer, other_low: int, other: Buffer) -> bool:
    return low < other_low + other.size and other_low < low + b.size
