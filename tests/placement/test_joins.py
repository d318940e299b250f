"""Search among joined buffers: what it finds is a placement, and blocks cut into many like parts come together."""

import numpy as np
import pytest
from dsa import buffers_of, core
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.instances import rectangles, tiles, wheels
from memo_compile.placement import Buffer, place, verify
from memo_compile.placement import kernel as kernels
from memo_compile.placement.bounds import worst_moment
from memo_compile.placement.kernel import FOUND, NOT_KNOWN

kernel = kernels.load()
pytestmark = pytest.mark.skipif(kernel is None, reason="no C++ compiler here, so that there is no compiled search")


def ask(problem, capacity, fixed=None, nodes=10**6, seed=0):
    c = core(problem, fixed=fixed)
    result, offsets, taken = kernel.search_joined(c, capacity // c.unit, nodes, seed, np.zeros(1, np.int32))
    return result, {name: int(o) * c.unit for name, o in zip(c.names, offsets, strict=True)}, taken


@pytest.mark.parametrize("cut", [rectangles, tiles])
@pytest.mark.parametrize("seed", range(2))
def test_a_block_cut_into_200_is_put_together_again(cut, seed):
    problem = cut(200, seed, steps=1000, height=2**20)
    result, offsets, _ = ask(problem, 2**20)
    assert result == FOUND
    verify(problem, offsets)
    assert max(offsets[b.name] + b.size for b in problem) == 2**20


@pytest.mark.parametrize("seed", range(2))
def test_what_no_straight_cut_divides_is_left_to_the_search(seed):
    assert place(wheels(200, seed), time_limit=60).peak == 1000


@pytest.mark.parametrize("seed", range(2))
def test_few_moments_and_much_alike_is_found_with_joins_only(seed, monkeypatch):
    """The orders of the plain search do not find it in as much work."""
    problem = tiles(200, seed, steps=30, height=2**20)
    assert place(problem, time_limit=60, work=100_000).peak == 2**20
    monkeypatch.setattr(kernels.Kernel, "search_joined", lambda *args: (NOT_KNOWN, np.zeros(len(problem), np.int64), 0))
    assert place(problem, time_limit=60, work=100_000).peak > 2**20


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([rectangles, tiles]), st.integers(2, 40), st.integers(0, 10**6), st.integers(4, 60), st.booleans()
)
def test_what_it_finds_is_a_placement_within_the_capacity(cut, count, seed, steps, holding):
    problem = cut(count, seed, steps=steps, height=1000)
    fixed = {problem[0].name: 0} if holding else {}
    result, offsets, _ = ask(problem, 1000, fixed, nodes=5_000)
    if result == FOUND:
        verify(problem, offsets, fixed=fixed)
        assert max(offsets[b.name] + b.size for b in problem) <= 1000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=12))
def test_of_any_buffers_it_finds_placements_or_nothing(rows):
    problem = buffers_of(rows)
    bound = worst_moment(problem, 1)[1]
    result, offsets, _ = ask(problem, bound, nodes=5_000)
    if result == FOUND:
        verify(problem, offsets)
        assert max(offsets[b.name] + b.size for b in problem) <= bound


def test_where_there_is_waste_nothing_is_joined():
    problem = [Buffer("a", 4, 0, 2), Buffer("b", 4, 2, 4), Buffer("c", 3, 1, 3)]
    assert ask(problem, 8)[0::2] == (NOT_KNOWN, 0)


def test_the_same_seed_gives_the_same_answer():
    problem = tiles(200, 3, steps=100, height=1000)
    answers = [ask(problem, 1000, nodes=50_000, seed=5) for _ in range(2)]
    assert answers[0] == answers[1]
