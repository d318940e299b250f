"""Greedy orders: the same in Python as compiled."""

import numpy as np
import pytest
from dsa import core, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.placement import kernel as kernels
from memo_compile.placement.greedy import ORDERS, first_fit, order_by

kernel = kernels.load()


@pytest.mark.skipif(kernel is None, reason="no C++ compiler here")
@settings(max_examples=50, deadline=None)
@given(problems(most=300), st.sampled_from(sorted(ORDERS)), st.integers(0, 50))
def test_python_and_cpp_put_every_buffer_at_the_same_offset(buffers, name, held):
    problem = core(buffers, fixed={buffers[0].name: held})
    if problem.n:
        order = order_by(problem, ORDERS[name])
        offsets, peak = first_fit(problem, order)
        compiled, compiled_peak = kernel.first_fit(problem, order, np.zeros(1, np.int32))
        assert (offsets == compiled).all()
        assert peak == compiled_peak
