"""The problem as solvers see it: arrays in one unit, aliases merged, times as moments at which the most is live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from memo_compile.placement.problem import Buffer, aligned

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Core:
    """`n` buffers of size > 0. `size` and `fixed` (−1 where free) count units of `unit` bytes.

    [start, end) are ranges of `moments`. Of all steps only those are kept at which the live set is contained in no
    other: two buffers that meet at all, meet at one of them. `life` counts steps.
    """

    names: tuple[str, ...]
    unit: int
    moments: int
    size: Ints
    start: Ints
    end: Ints
    fixed: Ints
    life: Ints

    @property
    def n(self) -> int:
        """The number of buffers."""
        return len(self.names)

    def live(self) -> Ints:
        """Units live at each moment."""
        change = np.zeros(self.moments + 1, np.int64)
        np.add.at(change, self.start, self.size)
        np.add.at(change, self.end, -self.size)
        return np.cumsum(change)[: self.moments]

    def lower_bound(self) -> int:
        """Units: the largest sum of live sizes, or the highest end of a fixed buffer."""
        fixed_end = (self.fixed + self.size)[self.fixed >= 0]
        return int(max(self.live().max(initial=0), fixed_end.max(initial=0)))


def core_of(buffers: Sequence[Buffer], alignment: int, fixed: Mapping[str, int]) -> Core:
    """The core of a checked problem without aliases. Buffers of size 0 are left out: they can lie anywhere."""
    kept = [b for b in buffers if b.size > 0]
    sizes = np.array([aligned(b.size, alignment) for b in kept], np.int64)
    offsets = np.array([fixed.get(b.name, -1) for b in kept], np.int64)
    unit = max(1, int(np.gcd.reduce(np.concatenate([sizes, offsets[offsets >= 0]])))) if kept else 1
    first, last = np.array([b.start for b in kept], np.int64), np.array([b.end for b in kept], np.int64)
    start, end, moments = _moments(first, last)
    return Core(
        names=tuple(b.name for b in kept),
        unit=unit,
        moments=moments,
        size=sizes // unit,
        start=start,
        end=end,
        fixed=np.where(offsets >= 0, offsets // unit, -1),
        life=last - first,
    )


def _moments(start: Ints, end: Ints) -> tuple[Ints, Ints, int]:
    """Ranges of those elementary intervals at which the live set is contained in no other."""
    steps = np.unique(np.concatenate([start, end]))
    births, deaths = np.isin(steps, start), np.isin(steps, end)
    kept: list[int] = []
    born = False
    for k in range(len(steps)):
        if deaths[k] and born:
            kept.append(k - 1)
            born = False
        born = born or bool(births[k])
    moments = np.array(kept, np.int64)
    return (
        np.searchsorted(moments, np.searchsorted(steps, start)).astype(np.int64),
        np.searchsorted(moments, np.searchsorted(steps, end)).astype(np.int64),
        len(kept),
    )


def root_names(buffers: Sequence[Buffer]) -> dict[str, str]:
    """For each buffer the name of the one whose offset it has in the end: its own, where it is no alias."""
    by_name = {b.name: b for b in buffers}
    roots: dict[str, str] = {}
    for b in buffers:
        now = b
        while now.alias is not None:
            now = by_name[now.alias]
        roots[b.name] = now.name
    return roots


def merge_aliases(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Buffers that share an offset become one that lives as long as all of them and is as large as the largest."""
    if all(b.alias is None for b in buffers):
        return list(buffers)
    by_name, roots = {b.name: b for b in buffers}, root_names(buffers)
    merged: dict[str, Buffer] = {}
    for b in buffers:
        root = roots[b.name]
        known = merged.get(root, by_name[root])
        merged[root] = replace(
            known, size=max(known.size, b.size), start=min(known.start, b.start), end=max(known.end, b.end)
        )
    return list(merged.values())
