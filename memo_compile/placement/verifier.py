"""Checks a placement, knowing nothing of how it was made."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import replace

from memo_compile.errors import PlacementOverlap
from memo_compile.placement.problem import Buffer, Placement


def verify(
    buffers: Sequence[Buffer],
    placement: Placement | Mapping[str, int],
    *,
    alignment: int = 1,
    fixed: Mapping[str, int] | None = None,
) -> None:
    """Check that no two buffers that live at the same time share a byte, and that all lie within the peak.

    A sweep over time holds what is live in order of offset: as long as nothing overlaps, a newcomer can only overlap
    its neighbours in that order, so that n buffers take O(n log n) comparisons.

    Args:
        buffers: what was to be placed.
        placement: the answer, or offsets by name.
        alignment: of which every offset must be a multiple.
        fixed: offsets that must be as given.

    Raises:
        PlacementOverlap: names the two buffers, or the one that has no place, lies outside or not where it must.
    """
    offsets = placement.offsets if isinstance(placement, Placement) else placement
    roots = _roots(buffers)
    if len(roots) < len(buffers):
        raise PlacementOverlap("a buffer's name is given twice")
    for b in buffers:
        offset = offsets.get(b.name, -1)
        if offset < 0:
            raise PlacementOverlap(f"buffer {b.name!r} has no offset, or a negative one")
        if offset % alignment:
            raise PlacementOverlap(f"buffer {b.name!r} at {offset} is not at a multiple of {alignment}")
        if isinstance(placement, Placement) and offset + b.size > placement.peak:
            raise PlacementOverlap(f"buffer {b.name!r} ends at {offset + b.size}, above {placement.peak}")
        if offset != offsets.get(roots[b.name]):
            raise PlacementOverlap(f"buffer {b.name!r} at {offset} does not share the offset of {roots[b.name]!r}")
    for name, offset in (fixed or {}).items():
        if offsets.get(name) != offset:
            raise PlacementOverlap(f"buffer {name!r} at {offsets.get(name)} was to stay at {offset}")
    _sweep(_lives([b for b in buffers if b.size > 0], roots), offsets, roots)


def _lives(buffers: Sequence[Buffer], roots: Mapping[str, str]) -> list[Buffer]:
    """Buffers that share a storage live from the first one's birth to the last one's death."""
    if all(b.alias is None for b in buffers):
        return list(buffers)
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    for b in buffers:
        root = roots[b.name]
        start[root], end[root] = min(b.start, start.get(root, b.start)), max(b.end, end.get(root, b.end))
    return [replace(b, start=start[roots[b.name]], end=end[roots[b.name]]) for b in buffers]


def _sweep(buffers: Sequence[Buffer], offsets: Mapping[str, int], roots: Mapping[str, str]) -> None:
    storage = {name: i for i, name in enumerate(dict.fromkeys(roots.values()))}
    # At one step deaths come before births.
    events = sorted(
        [(b.start, 1, i) for i, b in enumerate(buffers)] + [(b.end, 0, i) for i, b in enumerate(buffers)],
    )
    keys = [(offsets[b.name], storage[roots[b.name]], offsets[b.name] + b.size, i) for i, b in enumerate(buffers)]
    live: list[tuple[int, int, int, int]] = []
    for _, birth, i in events:
        key = keys[i]
        if not birth:
            del live[bisect_left(live, key)]
            continue
        at = bisect_left(live, key)
        below = at - 1
        while below >= 0 and live[below][1] == key[1]:
            below -= 1
        above = at
        while above < len(live) and live[above][1] == key[1]:
            above += 1
        if below >= 0 and live[below][2] > key[0]:
            raise _overlap(buffers[live[below][3]], buffers[i], offsets)
        if above < len(live) and live[above][0] < key[2]:
            raise _overlap(buffers[live[above][3]], buffers[i], offsets)
        insort(live, key)


def _overlap(earlier: Buffer, later: Buffer, offsets: Mapping[str, int]) -> PlacementOverlap:
    return PlacementOverlap(
        f"buffers {earlier.name!r} at {offsets[earlier.name]} and {later.name!r} at {offsets[later.name]} "
        f"share bytes from step {later.start} to {min(earlier.end, later.end)}"
    )


def _roots(buffers: Sequence[Buffer]) -> dict[str, str]:
    """Whose offset each buffer has; written again here, so that a mistake elsewhere is not repeated."""
    aliases = {b.name: b.alias for b in buffers}
    roots = {}
    for name in aliases:
        root = name
        while (alias := aliases.get(root)) is not None:
            root = alias
        roots[name] = root
    return roots
