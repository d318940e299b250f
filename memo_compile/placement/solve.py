"""The order in which solvers are asked: stop as soon as the peak is the lower bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from memo_compile.placement import kernel as kernels
from memo_compile.placement import mip
from memo_compile.placement.bounds import worst_moment
from memo_compile.placement.core import Core, Ints, core_of, merge_aliases, root_names
from memo_compile.placement.deadline import Deadline
from memo_compile.placement.greedy import ORDERS, greedy, improve, order_by
from memo_compile.placement.kernel import Kernel
from memo_compile.placement.preferences import at_preferred_ends
from memo_compile.placement.problem import (
    Buffer,
    Evidence,
    Placement,
    aligned,
    check,
    check_fixed,
    check_limits,
    of_roots,
)
from memo_compile.placement.search import search
from memo_compile.placement.verifier import verify

MANY = 2_000  # buffers: beyond this even one order of greedy wants the compiled kernel
IMPROVING = 4e8  # of (buffers)² × rounds spent on improving greedy before the search
DIVE = 2e9  # of buffers × (buffers live, summed over moments): above it the search does not get to the bottom once
SHORT = 60_000  # nodes of search before HiGHS is asked
HIGHS_NODE = 100  # nodes of search that one node of branch and bound is counted as
NOT_PROVED = "no placement within the capacity was found, and nothing is proved: more time may find one"
IN_PYTHON = " (in Python: no C++ kernel)"
SEARCHED = "a complete search has shown that no placement fits, though no single moment proves it"


@dataclass(frozen=True)
class _State:
    """The best so far, in units. No placement is below `least`; by the search, where that is above the lower bound."""

    offsets: Ints
    peak: int
    solver: str
    least: int
    work: int = 0


def place(
    buffers: Sequence[Buffer],
    *,
    alignment: int = 1,
    capacity: int | None = None,
    fixed: Mapping[str, int] | None = None,
    time_limit: float = 10.0,
    work: int | None = None,
) -> Placement:
    """Give each buffer an offset so that buffers live at the same time share no byte, and the peak is small.

    Args:
        buffers: what to place. Sizes in bytes, lifetimes half-open.
        alignment: every offset is a multiple of it. Peak and lower bound are of sizes rounded up to it.
        capacity: stop at a placement that fits; `Placement.fits` says whether one was found.
        fixed: offsets of buffers placed earlier.
        time_limit: seconds after which the best so far is returned.
        work: the most nodes of search. The answer is the same for the same work, unless the time limit cut it short.

    Raises:
        InvalidBuffer: a buffer that cannot be.
        FixedOffsetImpossible: a fixed offset that cannot hold.
        InvalidOption: an alignment, capacity, time limit or work that cannot be.

    >>> answer = place([Buffer("a", 4, 0, 2), Buffer("b", 4, 2, 4)])
    >>> answer.peak, answer.proved_optimal
    (4, True)
    """
    started = time.perf_counter()
    buffers = list(buffers)
    check_limits(alignment, capacity, time_limit, work)
    check(buffers, alignment)
    buffers = [_with_plain_numbers(b) for b in buffers]
    roots = root_names(buffers)
    merged = merge_aliases(buffers)
    fixed = of_roots(fixed or {}, roots)
    check_fixed(merged, fixed, alignment)
    core = core_of(merged, alignment, fixed)
    bound = core.lower_bound()
    prepared = time.perf_counter() - started
    # What remains after the solvers (the verifier above all) takes about as long as what came before them.
    with Deadline(max(0.0, time_limit - 3 * prepared)) as deadline:
        state = _solve(
            core, bound, None if capacity is None else aligned(capacity, alignment) // core.unit, deadline, work
        )
    offsets = {b.name: fixed.get(b.name, 0) for b in merged}
    offsets |= {name: int(o) * core.unit for name, o in zip(core.names, state.offsets, strict=True)}
    peak = state.peak * core.unit
    peak = max([peak, *(o + aligned(b.size, alignment) for b in merged if (o := fixed.get(b.name)) is not None)])
    offsets = at_preferred_ends(merged, offsets, peak, alignment, fixed)
    offsets = {b.name: offsets[roots[b.name]] for b in buffers}
    end = max((offsets[b.name] + b.size for b in buffers), default=0)
    fits, evidence, reason = _verdict(merged, alignment, capacity, end, bound * core.unit, state.least * core.unit)
    placement = Placement(
        offsets=offsets,
        peak=peak,
        lower_bound=bound * core.unit,
        proved_optimal=peak <= state.least * core.unit,
        solver=state.solver,
        seconds=0.0,
        fits=fits,
        evidence=evidence,
        reason=reason,
    )
    verify(buffers, placement, alignment=alignment, fixed=fixed)
    return replace(placement, seconds=time.perf_counter() - started)


def _with_plain_numbers(b: Buffer) -> Buffer:
    """numpy's numbers overflow, and change their type, in sums."""
    if type(b.size) is type(b.start) is type(b.end) is int:
        return b
    return replace(b, size=int(b.size), start=int(b.start), end=int(b.end))


def _solve(core: Core, bound: int, capacity: int | None, deadline: Deadline, work: int | None) -> _State:
    """In units. A capacity below the bound cannot be met: greedy's answer is enough then."""
    if core.n == 0:
        return _State(np.zeros(0, np.int64), 0, "nothing to place", bound)
    goal = bound if capacity is None else max(bound, capacity)
    kernel = kernels.load(deadline.remaining() / 2) if core.n > MANY else None
    offsets, peak, name = greedy(core, goal, kernel, deadline)
    alone = core.n > MANY and kernel is None
    state = _State(offsets, peak, f"greedy by {name}{IN_PYTHON if alone else ''}", bound)
    if peak <= goal or (capacity is not None and capacity < bound) or deadline.passed():
        return state
    kernel = kernels.load(deadline.remaining())
    state = _improve(core, state, goal, name, kernel, deadline)
    if kernel is not None and _can_search(core):
        state = _search(core, state, kernel, capacity, deadline, SHORT if work is None else min(SHORT, work))
    exact = int(core.size.sum()) < mip.EXACT
    if not _done(state, capacity) and core.n <= mip.LARGEST and exact and not deadline.passed():
        state = _mip(core, state, deadline, work)
    if kernel is not None and _can_search(core) and not _done(state, capacity):
        remaining = None if work is None else work - state.work
        state = _search(core, state, kernel, capacity, deadline, remaining)
    elif not _done(state, capacity) and not (core.n <= mip.LARGEST and exact):
        state = _improve_on(core, state, goal, kernel, deadline, work)
    if kernel is None and IN_PYTHON not in state.solver:
        state = replace(state, solver=state.solver + IN_PYTHON)
    return state


def _done(state: _State, capacity: int | None) -> bool:
    if capacity is not None and state.least > capacity:
        return True
    return state.peak <= max(state.least, capacity or 0)


def _can_search(core: Core) -> bool:
    return core.n * float((core.end - core.start).sum()) <= DIVE


def _improve(core: Core, state: _State, goal: int, name: str, kernel: Kernel | None, deadline: Deadline) -> _State:
    rounds = int(max(4, min(100, IMPROVING / core.n**2)))
    order = order_by(core, ORDERS[name])
    if kernel is None:
        result = improve(core, order, goal, rounds, 0, deadline)
    else:
        result = kernel.improve(core, order, goal, rounds, 0, deadline.stop)
    return _better(state, result, f"greedy by {name}, improved")


def _improve_on(
    core: Core, state: _State, goal: int, kernel: Kernel | None, deadline: Deadline, work: int | None
) -> _State:
    """Too large to search: one order after the other, from each a little way, then further."""
    rounds, seed, spent = 8, 1, 0
    while state.peak > goal and not deadline.passed() and (work is None or spent < work):
        for name, keys in ORDERS.items():
            if kernel is None:
                result = improve(core, order_by(core, keys), goal, rounds, seed, deadline)
            else:
                result = kernel.improve(core, order_by(core, keys), goal, rounds, seed, deadline.stop)
            state = _better(state, result, f"greedy by {name}, improved")
            spent += rounds * core.n
            if state.peak <= goal or deadline.passed() or (work is not None and spent >= work):
                break
        rounds, seed = 2 * rounds, seed + 1
    return state


def _search(
    core: Core, state: _State, kernel: Kernel, capacity: int | None, deadline: Deadline, work: int | None
) -> _State:
    found = search(core, kernel, state.peak, state.least, capacity, deadline, work)
    result = None if found.offsets is None else (found.offsets, found.peak)
    state = _better(state, result, "search")
    return replace(state, least=max(state.least, found.least), work=state.work + found.work)


def _mip(core: Core, state: _State, deadline: Deadline, work: int | None) -> _State:
    nodes = None if work is None else max(1, work // HIGHS_NODE)
    answer = mip.solve(core, state.offsets, state.least, deadline, nodes=nodes)
    result = None if answer.offsets is None else (answer.offsets, int((answer.offsets + core.size).max()))
    return replace(_better(state, result, "HiGHS"), least=max(state.least, answer.least))


def _better(state: _State, result: tuple[Ints, int] | None, solver: str) -> _State:
    if result is None or result[1] >= state.peak:
        return state
    return replace(state, offsets=result[0], peak=result[1], solver=solver)


def _verdict(
    buffers: Sequence[Buffer], alignment: int, capacity: int | None, end: int, bound: int, least: int
) -> tuple[bool | None, Evidence | None, str]:
    """Whether the capacity is met, the moment that proves that it cannot be, and what is proved in words.

    `end` is that of the last buffer itself; peak and bounds are of sizes rounded up, so that they may be beyond a
    capacity that is no multiple of the alignment, by up to the next one.
    """
    if capacity is None or end <= capacity:
        return True, None, ""
    rounded = aligned(capacity, alignment)
    for unit, limit in ((alignment, rounded), (1, capacity)):
        evidence = _evidence(buffers, unit)
        if evidence.live > limit:
            names = ", ".join(evidence.buffers[:8]) + (", …" if len(evidence.buffers) > 8 else "")
            return False, evidence, f"at step {evidence.step} {evidence.live} bytes are live, above {limit}: {names}"
    if least <= rounded:
        return None, None, NOT_PROVED
    capacity = rounded
    if bound > capacity:
        return False, None, f"a fixed buffer ends at {bound}, above {capacity}"
    return False, None, SEARCHED


def _evidence(buffers: Sequence[Buffer], alignment: int) -> Evidence:
    step, live = worst_moment(buffers, alignment)
    return Evidence(step, live, tuple(b.name for b in buffers if b.start <= step < b.end and b.size > 0))
