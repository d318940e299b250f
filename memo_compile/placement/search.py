"""The complete search, asked by several orders at once, and a ladder of capacities.

The search itself is in native/search.hpp. It answers whether a capacity can be met, and what it finds it finds soon or
late depending on luck: so several orders take turns, each with a budget of nodes that doubles from round to round, on
as many threads as there are cores; and with them native/joins.hpp, which searches among buffers that it has joined.
Which answer counts never depends on which thread was first, so that the result is the same for the same work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from memo_compile.placement.core import Core, Ints
from memo_compile.placement.deadline import Deadline
from memo_compile.placement.greedy import order_by
from memo_compile.placement.kernel import FOUND, NONE_THERE, NOT_KNOWN, Kernel

PRIORITIES: tuple[tuple[str, ...], ...] = (
    ("-size", "-life", "-area"),
    ("-area", "-life", "-contention"),
    ("-contention", "-area", "-life"),
    ("-life", "-area", "-contention"),
)
FIRST_BUDGET = 4_000  # nodes of each order in the first round
LAST_BUDGET = 2**22
RUNGS = (0.0, 0.1, 0.35)  # of the way from what is proved impossible to the best known


@dataclass(frozen=True)
class Found:
    """`offsets` (None where nothing better than what was known was found), all in units.

    No placement is below `least`. `work` counts the nodes taken.
    """

    offsets: Ints | None
    peak: int
    least: int
    work: int


def search(
    core: Core, kernel: Kernel, peak: int, least: int, capacity: int | None, deadline: Deadline, work: int | None
) -> Found:
    """Look for a placement below `peak`, or within a capacity, until there is proof or work or time end.

    Args:
        core: the problem.
        kernel: the compiled search.
        peak: of the best placement so far.
        least: a lower bound.
        capacity: stop at the first placement within it; None for the smallest.
        deadline: when to stop.
        work: the most nodes to take, None for no limit.
    """
    ranks = [_rank(order_by(core, keys)) for keys in PRIORITIES]
    offsets: Ints | None = None
    taken, turn, budget = 0, 0, max(FIRST_BUDGET, 6 * core.n)
    with ThreadPoolExecutor(max(1, _cores())) as pool:
        while peak > max(least, capacity or 0) and not deadline.passed() and (work is None or taken < work):
            progress = False
            for rung in _rungs(least, peak, capacity):
                result, found, nodes = _ask(pool, core, kernel, ranks, rung, budget, turn, deadline)
                taken += nodes
                if result == FOUND:
                    offsets, peak, progress = found, int((found + core.size).max()), True
                    break
                if result == NONE_THERE:
                    least, progress = rung + 1, True
                    break
                if deadline.passed() or (work is not None and taken >= work):
                    break
            turn += 1
            if not progress:
                budget = min(2 * budget, LAST_BUDGET)
    return Found(offsets, peak, min(least, peak), taken)


def _rungs(least: int, peak: int, capacity: int | None) -> Iterator[int]:
    if capacity is not None:
        yield max(least, capacity)
        return
    yield from sorted({min(peak - 1, int(least + share * (peak - least))) for share in RUNGS})


def _ask(
    pool: ThreadPoolExecutor,
    core: Core,
    kernel: Kernel,
    ranks: list[Ints],
    capacity: int,
    budget: int,
    turn: int,
    deadline: Deadline,
) -> tuple[int, Ints, int]:
    """Joined buffers and all orders at one capacity. The first that knows counts; those after it are stopped."""
    flags = [np.zeros(1, np.int32) for _ in range(1 + len(ranks))]
    asked: list[Future[tuple[int, Ints, int]]] = [
        pool.submit(kernel.search_joined, core, capacity, budget, turn, flags[0])
    ]
    asked += [
        pool.submit(kernel.search, core, rank, capacity, budget, turn * len(ranks) + k, flag)
        for k, (rank, flag) in enumerate(zip(ranks, flags[1:], strict=True))
    ]
    nodes = 0
    answer = (NOT_KNOWN, np.zeros(0, np.int64))
    for k, future in enumerate(asked):
        result, offsets, taken = _wait(future, flags, deadline)
        nodes += taken
        if result != NOT_KNOWN:
            answer = (result, offsets)
            for flag in flags[k + 1 :]:
                flag[0] = 1
            break
    for future in asked:
        future.exception()  # waits: nobody may still read the flags
    return (*answer, nodes)


def _wait(
    future: Future[tuple[int, Ints, int]], flags: list[np.ndarray[tuple[int], np.dtype[np.int32]]], deadline: Deadline
) -> tuple[int, Ints, int]:
    try:
        return future.result(timeout=deadline.remaining())
    except TimeoutError:
        for flag in flags:
            flag[0] = 1
        return future.result()


def _rank(order: Ints) -> Ints:
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
