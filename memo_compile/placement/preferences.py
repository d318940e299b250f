"""Moves buffers toward the end of the arena that they prefer, after the peak is decided and without raising it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memo_compile.placement.problem import Buffer, aligned


def at_preferred_ends(
    buffers: Sequence[Buffer], offsets: Mapping[str, int], peak: int, alignment: int, fixed: Mapping[str, int]
) -> dict[str, int]:
    """Offsets in which every buffer with a preference lies as far to its side as the others let it.

    A mirrored placement is as good as the first, so the better of the two is where it starts.
    """
    result = dict(offsets)
    if all(b.prefer == "any" for b in buffers):
        return result
    if not fixed:
        mirrored = {b.name: peak - result[b.name] - aligned(b.size, alignment) for b in buffers}
        if _distance(buffers, mirrored, peak) < _distance(buffers, result, peak):
            result = mirrored
    lows = [b for b in buffers if b.prefer == "low" and b.name not in fixed]
    highs = [b for b in buffers if b.prefer == "high" and b.name not in fixed]
    for b in sorted(lows, key=lambda b: (result[b.name], b.name)):
        result[b.name] = min(_free_offsets(b, buffers, result, peak, alignment))
    for b in sorted(highs, key=lambda b: (-result[b.name], b.name)):
        result[b.name] = max(_free_offsets(b, buffers, result, peak, alignment))
    return result


def _distance(buffers: Sequence[Buffer], offsets: Mapping[str, int], peak: int) -> int:
    """Bytes times bytes: how far those with a preference lie from where they would rather be."""
    return sum(
        b.size * (offsets[b.name] if b.prefer == "low" else peak - offsets[b.name] - b.size)
        for b in buffers
        if b.prefer != "any"
    )


def _free_offsets(
    b: Buffer, buffers: Sequence[Buffer], offsets: Mapping[str, int], peak: int, alignment: int
) -> list[int]:
    """The lowest and the highest offset of each gap that b fits in; where it lies now is in one of them."""
    size = aligned(b.size, alignment)
    taken = sorted(
        (offsets[o.name], offsets[o.name] + aligned(o.size, alignment))
        for o in buffers
        if o.name != b.name and o.size > 0 and o.start < b.end and b.start < o.end
    )
    found, floor = [], 0
    for low, high in [*taken, (peak, peak)]:
        if low - floor >= size:
            found += [floor, low - size]
        floor = max(floor, high)
    return found
