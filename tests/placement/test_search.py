"""The search: it finds what there is, proves what there is not, and is the same for the same work."""

import numpy as np
import pytest
from dsa import buffers_of, core, instance, smallest_peak
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.instances import rectangles
from memo_compile.placement import kernel as kernels
from memo_compile.placement import place, verify
from memo_compile.placement.deadline import Deadline
from memo_compile.placement.greedy import order_by
from memo_compile.placement.kernel import FOUND, NONE_THERE
from memo_compile.placement.search import PRIORITIES, search

kernel = kernels.load()
pytestmark = pytest.mark.skipif(kernel is None, reason="no C++ compiler here, so that there is no compiled search")

few = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=7)


def ask(problem, capacity, fixed=None, keys=PRIORITIES[0], nodes=10**6):
    c = core(problem, fixed=fixed)
    rank = np.empty(c.n, np.int64)
    rank[order_by(c, keys)] = np.arange(c.n)
    result, offsets, _ = kernel.search(c, rank, capacity // c.unit, nodes, 0, np.zeros(1, np.int32))
    return result, {name: int(o) * c.unit for name, o in zip(c.names, offsets, strict=True)}


@settings(max_examples=50, deadline=None)
@given(few, st.sampled_from(PRIORITIES))
def test_it_finds_the_optimum_and_proves_that_nothing_is_below(rows, keys):
    problem = buffers_of(rows)
    best = smallest_peak(problem)
    result, offsets = ask(problem, best, keys=keys)
    assert result == FOUND
    verify(problem, offsets)
    assert max(offsets[b.name] + b.size for b in problem) <= best
    assert ask(problem, best - 1, keys=keys)[0] == NONE_THERE


@settings(max_examples=40, deadline=None)
@given(few, st.integers(0, 12), st.integers(0, 12))
def test_it_respects_fixed_buffers_and_stays_complete(rows, first, second):
    problem = buffers_of(rows)
    fixed = {"b0": first}
    if len(problem) > 1 and (problem[0].end <= problem[1].start or problem[1].end <= problem[0].start):
        fixed["b1"] = second
    best = smallest_peak(problem, fixed)
    result, offsets = ask(problem, best, fixed)
    assert result == FOUND
    verify(problem, offsets, fixed=fixed)
    bound = core(problem, fixed=fixed)
    if best - 1 >= bound.lower_bound() * bound.unit:
        assert ask(problem, best - 1, fixed)[0] == NONE_THERE


@pytest.mark.parametrize("count", [50, 100, 200])
@pytest.mark.parametrize("seed", range(2))
def test_a_block_cut_into_rectangles_is_put_together_again(count, seed):
    answer = place(rectangles(count, seed), time_limit=60)
    assert (answer.peak, answer.proved_optimal) == (1000, True)


@pytest.mark.parametrize("name", "CFIK")
def test_it_fits_what_greedy_does_not(name):
    problem = instance(f"minimalloc-{name}")
    answer = place(problem, capacity=1_048_576, time_limit=120)
    assert answer.fits
    assert answer.solver == "search"


def test_the_same_work_gives_the_same_answer():
    problem = core(rectangles(120, 5, steps=64, height=1024))
    with Deadline(120) as deadline:
        answers = [search(problem, kernel, 2000, 1024, None, deadline, 40_000) for _ in range(2)]
    assert answers[0].work == answers[1].work
    assert answers[0].peak == answers[1].peak
    assert (answers[0].offsets == answers[1].offsets).all()


@pytest.mark.parametrize("seed", [7, 11])
def test_without_its_cuts_it_would_take_longer(seed):
    """Three times as many nodes or more without: room from each height up, the larger below, states known to fail."""
    problem = rectangles(100, seed, 100, 2**20)
    result, offsets = ask(problem, 2**20, nodes=6_000)
    assert result == FOUND
    verify(problem, offsets)
