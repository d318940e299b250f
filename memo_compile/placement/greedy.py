"""Greedy placement: each buffer, in some order, at the lowest offset that is free for all of its life.

A portfolio of orders is tried, and the first to reach the goal ends it. On graphs of training steps one of them nearly
always does.
"""

from __future__ import annotations

from bisect import insort

import numpy as np

from memo_compile.placement.core import Core, Ints
from memo_compile.placement.deadline import Deadline
from memo_compile.placement.kernel import Kernel

# Keys to sort by, most important first; a minus sign means descending.
ORDERS: dict[str, tuple[str, ...]] = {
    "size": ("-size", "start", "end"),
    "area": ("-area", "start"),
    "life": ("-life", "-size", "start"),
    "start": ("start", "-size", "end"),
    "end": ("-end", "-size", "start"),
    "life then start": ("-life", "start", "-size"),
    "contention": ("-contention", "-area"),
}


def order_by(core: Core, keys: tuple[str, ...]) -> Ints:
    """Indices of buffers, sorted by keys of ORDERS; ties by name."""
    columns = []
    for key in keys:
        column = _column(core, key.lstrip("-"))
        columns.append(-column if key.startswith("-") else column)
    by_name = np.empty(core.n, np.int64)
    by_name[sorted(range(core.n), key=core.names.__getitem__)] = np.arange(core.n)
    return np.lexsort((by_name, *reversed(columns))).astype(np.int64)


def _column(core: Core, key: str) -> Ints:
    if key == "area":
        return core.life * core.size
    if key == "contention":  # the most that is live while it lives
        live = core.live()
        return np.array([live[a:b].max() for a, b in zip(core.start, core.end, strict=True)], np.int64)
    return {"size": core.size, "life": core.life, "start": core.start, "end": core.end}[key]


def greedy(core: Core, goal: int, kernel: Kernel | None, deadline: Deadline) -> tuple[Ints, int, str]:
    """Offsets, peak and the order's name of the first order that reaches `goal`, else of the best.

    One order is always finished, whatever the deadline says: there has to be an answer.
    """
    best: tuple[Ints, int, str] | None = None
    for name, keys in ORDERS.items():
        order = order_by(core, keys)
        if kernel is None:
            result = first_fit(core, order, deadline if best else None)
        else:
            result = kernel.first_fit(core, order, deadline.stop if best else np.zeros(1, np.int32))
        if result is not None and (best is None or result[1] < best[1]):
            best = (*result, name)
        if best and (best[1] <= goal or deadline.passed()):
            break
    assert best is not None
    return best


def first_fit(core: Core, order: Ints, deadline: Deadline | None = None) -> tuple[Ints, int] | None:
    """Offsets and peak, in units, of first fit in an order; None when the deadline passed."""
    size, start, end = core.size.tolist(), core.start.tolist(), core.end.tolist()
    offsets = core.fixed.tolist()
    shelf = sorted((o, o + size[i], start[i], end[i]) for i, o in enumerate(offsets) if o >= 0)
    for k, i in enumerate(order.tolist()):
        if deadline is not None and k % 64 == 0 and deadline.passed():
            return None
        if offsets[i] < 0:
            offsets[i] = _lowest_free(shelf, size[i], start[i], end[i])
            insort(shelf, (offsets[i], offsets[i] + size[i], start[i], end[i]))
    placed = np.array(offsets, np.int64)
    return placed, int((placed + core.size).max(initial=0))


def improve(core: Core, order: Ints, goal: int, rounds: int, seed: int, deadline: Deadline) -> tuple[Ints, int] | None:
    """First fit again and again; buffers that ended above `goal` come earlier in the next order.

    What Kernel.improve does, in Python, for where no compiler is.
    """
    random = np.random.default_rng(seed)
    key = np.empty(core.n)
    best: tuple[Ints, int] | None = None
    for _ in range(rounds):
        result = first_fit(core, order, deadline)
        if result is None:
            break
        if best is None or result[1] < best[1]:
            best = result
        if result[1] <= goal:
            break
        key[order] = np.arange(core.n)
        late = result[0] + core.size > goal
        key[late] *= random.uniform(0.2, 0.8, int(late.sum()))
        order = np.argsort(key, kind="stable").astype(np.int64)
    return best


def _lowest_free(shelf: list[tuple[int, int, int, int]], size: int, start: int, end: int) -> int:
    """The lowest offset at which `size` is free over [start, end). Of what is placed, by offset, little is looked at:
    most buffers find a gap near the bottom.
    """
    offset = 0
    for low, high, other_start, other_end in shelf:
        if other_start < end and start < other_end:
            if low - offset >= size:
                break
            if high > offset:
                offset = high
    return offset
