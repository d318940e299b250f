"""Strategies asked for by name: each plays as its rule does, and says so where it does not fit."""

from dataclasses import replace

import pytest

from memo_compile.errors import InvalidOption
from memo_compile.forecast.strategies import STRATEGIES, Stack, alone
from memo_compile.planning.residency import Activation, Problem

MIB = 2**20
LAYERS = 6


def stack(budget):
    """Layers of an input and a wide value made from it; the next input is made from the wide value."""
    activations, needs, layer = [], {}, {}
    for i in range(LAYERS):
        back = 4 * LAYERS - 1 - 2 * i
        activations += [
            Activation(f"in{i}", MIB, 64, 2 * i, 2 * i + 1, back, back, 1e-3 if i else None),
            Activation(f"wide{i}", 4 * MIB, 64, 2 * i + 1, 2 * i + 1, back - 1, back - 1, 1e-3),
        ]
        needs |= {f"in{i}": (f"wide{i - 1}",) if i else (), f"wide{i}": (f"in{i}",)}
        layer |= {f"in{i}": i, f"wide{i}": i}
    steps = 4 * LAYERS
    problem = Problem((1e-3,) * steps, (0,) * steps, steps // 2, tuple(activations), budget, 1 << 40, 1e10, 1e10)
    inputs = frozenset(f"in{i}" for i in range(LAYERS))
    return Stack(problem, needs, layer, inputs, frozenset(), (inputs, frozenset()))


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_plays_with_room_and_none_is_faster_than_memo(name):
    _, decision, fits = alone(stack(100 * MIB), name)
    assert fits
    assert decision.seconds >= alone(stack(100 * MIB), "memo")[1].seconds * 0.999
    again = sum(home.recomputed for home in decision.residency.values())
    assert (decision.recompute_seconds > 0) == (again > 0)


def test_full_recompute_keeps_inputs_and_makes_the_rest_again():
    _, decision, _ = alone(stack(100 * MIB), "full recompute")
    assert all(decision.residency[f"in{i}"].kept == 64 for i in range(LAYERS))
    assert all(decision.residency[f"wide{i}"].recomputed == 64 for i in range(LAYERS))
    assert decision.recompute_seconds == pytest.approx(LAYERS * 1e-3)


def test_what_no_layer_holds_is_not_made_again():
    inside = stack(100 * MIB)
    outside = replace(inside, layer={**inside.layer, "wide5": -1})
    assert alone(outside, "full recompute")[1].residency["wide5"].kept == 64


def test_what_does_not_fit_says_how_much_it_needs():
    problem, decision, fits = alone(stack(8 * MIB), "keep all")
    assert not fits
    assert problem.budget == 8 * MIB < decision.peak == LAYERS * 5 * MIB


def test_an_unknown_name_is_refused():
    with pytest.raises(InvalidOption, match="full recompute"):
        alone(stack(8 * MIB), "pray")
