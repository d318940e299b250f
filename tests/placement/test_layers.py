"""Two levels: equal layers are placed alike, and never worse than flat by more than a thousandth."""

import pytest
from dsa import buffers_of
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.placement import Buffer, place, verify
from memo_compile.placement.layers import SLACK, place_layers


def repeated(layers, shape, kept=0):
    """`layers` copies of (size, start, life), one after the other, each with a buffer kept until the end."""
    span = max(start + life for _, start, life in shape)
    buffers, layer_of = [], {}
    for k in range(layers):
        for i, (size, start, life) in enumerate(shape):
            b = Buffer(f"l{k}.{i}", size, k * span + start, k * span + start + life)
            buffers.append(b)
            layer_of[b.name] = k
        if kept:
            buffers.append(Buffer(f"kept{k}", kept, k * span, layers * span))
    return buffers, layer_of


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(1, 8)), min_size=2, max_size=10)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(2, 5), st.integers(0, 30))
def test_it_is_valid_and_no_worse_than_flat_by_more_than_a_thousandth(shape, layers, kept):
    buffers, layer_of = repeated(layers, shape, kept)
    answer = place_layers(buffers, layer_of, work=500)
    verify(buffers, answer)
    assert answer.peak <= (1 + SLACK) * place(buffers, work=500).peak


def test_equal_layers_are_placed_once_and_lie_alike():
    buffers, layer_of = repeated(6, [(8, 0, 3), (4, 1, 4), (6, 3, 4), (2, 2, 2)])
    answer = place_layers(buffers, layer_of)
    assert answer.solver.startswith("two levels")
    assert answer.proved_optimal
    for i in range(4):
        assert len({answer.offsets[f"l{k}.{i}"] for k in range(6)}) == 1


def test_where_blocks_would_cost_room_it_is_flat():
    # The layers' peaks alternate with what lives beside them: as blocks they would stand on each other.
    shape = [(10, 0, 1), (1, 0, 4)]
    buffers, layer_of = repeated(3, shape)
    beside = [Buffer(f"beside{k}", 9, 4 * k + 2, 4 * k + 4) for k in range(3)]
    answer = place_layers([*buffers, *beside], layer_of)
    assert (answer.peak, answer.proved_optimal) == (11, True)
    assert not answer.solver.startswith("two levels")


@pytest.mark.parametrize("labels", [{}, {"b0": 0}, {"not there": 1}])
def test_without_layers_that_repeat_it_is_flat_placement(labels):
    buffers = buffers_of([(4, 0, 2), (3, 1, 4), (5, 3, 3)])
    assert place_layers(buffers, labels).offsets == place(buffers).offsets


def test_a_capacity_is_met_or_refused_as_by_flat_placement():
    buffers, layer_of = repeated(6, [(8, 0, 3), (4, 1, 4), (6, 3, 4), (2, 2, 2)], kept=1)
    least = place(buffers).peak
    assert place_layers(buffers, layer_of, capacity=least).fits is True
    refused = place_layers(buffers, layer_of, capacity=least - 1)
    assert refused.fits is False
    assert refused.evidence.live == least
