"""HiGHS: it proves the optimum of small problems, and the live-set inequalities are what proves it early."""

import numpy as np
import pytest
from dsa import buffers_of, core, smallest_peak
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.placement import mip, verify
from memo_compile.placement.deadline import Deadline
from memo_compile.placement.mip import Tricks, solve

few = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(1, 5)), min_size=2, max_size=6)
NONE = Tricks(live_sets=False, symmetry=False, warm_start=False, bound_first=False)


def stacked(problem):
    """Each on all before it: the worst placement there is."""
    return np.cumsum(problem.size) - problem.size


@settings(max_examples=15, deadline=None)
@given(few, st.sampled_from([Tricks(), Tricks(bound_first=False), Tricks(symmetry=False), NONE]))
def test_it_proves_the_optimum(rows, tricks):
    buffers = buffers_of(rows)
    problem = core(buffers)
    known = stacked(problem)
    answer = solve(problem, known, problem.lower_bound(), Deadline(60), tricks)
    offsets = known if answer.offsets is None else answer.offsets
    verify(buffers, {name: int(o) * problem.unit for name, o in zip(problem.names, offsets, strict=True)})
    assert int((offsets + problem.size).max()) * problem.unit == answer.least * problem.unit == smallest_peak(buffers)


@pytest.mark.parametrize(("live_sets", "proved"), [(True, True), (False, False)])
def test_live_sets_refute_without_branching(live_sets, proved):
    problem = core(buffers_of([(size, 0, 1) for size in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)]))
    tricks = Tricks(live_sets=live_sets, symmetry=False)
    short = int(problem.size.sum()) - 1
    answer = solve(problem, stacked(problem), short, Deadline(60), tricks, nodes=1)
    assert answer.offsets is None
    assert (answer.least > short) is proved


def test_equal_buffers_are_put_in_order():
    problem = core(buffers_of([(4, 0, 3)] * 3 + [(5, 1, 1)]))
    program = mip._Program(problem, problem.lower_bound(), 30, Tricks(), None)
    offsets, proved = program.run(None, Deadline(60))
    assert proved
    assert list(offsets[:3]) == sorted(offsets[:3])
