"""The order in which solvers are asked: stop as soon as the peak is the lower bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from memo_compile.placement.bounds import lower_bound
from memo_compile.placement.greedy import ORDERS, place_in_order
from memo_compile.placement.problem import Buffer, Placement, check
from memo_compile.placement.verifier import verify


def place(
    buffers: Sequence[Buffer],
    *,
    alignment: int = 1,
    capacity: int | None = None,
    fixed: Mapping[str, int] | None = None,
    time_limit: float = 10.0,
) -> Placement:
    """Give each buffer an offset so that buffers live at the same time share no byte, and the peak is small.

    Args:
        buffers: what to place. Sizes in bytes, lifetimes half-open.
        alignment: every offset is a multiple of it.
        capacity: stop at a placement that fits; `Placement.fits` says whether one was found.
        fixed: offsets of buffers placed earlier.
        time_limit: seconds after which the best so far is returned.

    Raises:
        InvalidBuffer: a buffer that cannot be.

    >>> answer = place([Buffer("a", 4, 0, 2), Buffer("b", 4, 2, 4)])
    >>> answer.peak, answer.proved_optimal
    (4, True)
    """
    started = time.perf_counter()
    check(buffers)
    fixed = fixed or {}
    merged = _merge_aliases(buffers)
    bound = lower_bound(merged, alignment)
    goal = bound if capacity is None else max(bound, capacity)
    best: tuple[int, dict[str, int], str] | None = None
    for name, order in ORDERS.items():
        offsets, peak = place_in_order(merged, order, alignment, fixed)
        if best is None or peak < best[0]:
            best = (peak, offsets, f"greedy by {name}")
        if peak <= goal or time.perf_counter() - started > time_limit:
            break
    assert best is not None
    peak, offsets, solver = best
    for b in buffers:
        if b.alias is not None:
            offsets[b.name] = offsets[_root_name(b, {c.name: c for c in buffers})]
    placement = Placement(offsets, peak, bound, peak == bound, solver, 0.0, _fits(peak, bound, capacity))
    verify(buffers, placement)
    return replace(placement, seconds=time.perf_counter() - started)


def _fits(peak: int, bound: int, capacity: int | None) -> bool | None:
    if capacity is None or peak <= capacity:
        return True
    return False if bound > capacity else None


def _root_name(b: Buffer, by_name: Mapping[str, Buffer]) -> str:
    while b.alias is not None:
        b = by_name[b.alias]
    return b.name


def _merge_aliases(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Buffers that share an offset become one that lives as long as all of them and is as large as the largest."""
    by_name = {b.name: b for b in buffers}
    merged: dict[str, Buffer] = {}
    for b in buffers:
        root = _root_name(b, by_name)
        known = merged.get(root, replace(by_name[root], alias=None))
        merged[root] = replace(
            known, size=max(known.size, b.size), start=min(known.start, b.start), end=max(known.end, b.end)
        )
    return list(merged.values())
