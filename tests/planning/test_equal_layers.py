"""Equal layers have equal homes where that costs next to nothing."""

from dataclasses import replace

import pytest

from memo_compile.passes.analysis.layers import LayerInfo
from memo_compile.planning import equal_layers
from memo_compile.planning.equal_layers import FEWEST, with_equal_layers
from memo_compile.planning.residency import Activation, Problem, memory_profile
from memo_compile.planning.rounding import decide

MIB, TOKENS, PLACES, STEP = 2**20, 64, 2, 1e-3


def stack(layers, *, budget, rate=4e9, recompute=2e-4):
    """Layers that save a value of 1 MiB and one of 2, in that order; a backward that reads them the other way round."""
    steps = PLACES * layers
    activations = tuple(
        Activation(
            name=f"layer {i // PLACES}, {i % PLACES}",
            bytes=(1 + i % PLACES) * MIB,
            tokens=TOKENS,
            produced=i,
            last_forward=i,
            first_backward=2 * steps - 1 - i,
            last_backward=2 * steps - 1 - i,
            recompute_seconds=recompute,
        )
        for i in range(steps)
    )
    return Problem((STEP,) * (2 * steps), (0,) * (2 * steps), steps, activations, budget, 1 << 40, rate, rate)


def layers_of(problem, cls=lambda layer: 0):
    found = [(i // PLACES, i % PLACES, a.name) for i, a in enumerate(problem.activations)]
    return {name: LayerInfo(layer, cls(layer), place) for layer, place, name in found}


def homes(decision, place, layers=range(100)):
    return {home for name, home in decision.residency.items() for i in layers if name == f"layer {i}, {place}"}


@pytest.fixture
def problem():
    return stack(8, budget=17 * MIB, rate=8e9)


def test_each_place_has_one_home_within_the_budget_at_a_cost_that_is_told(problem):
    free = decide(problem)
    assert any(len(homes(free, place)) > 1 for place in range(PLACES)), "else there is nothing to see"
    equal = with_equal_layers(problem, free, layers_of(problem))
    assert [len(homes(equal, place)) for place in range(PLACES)] == [1, 1]
    assert max(memory_profile(problem, equal.residency)) <= problem.budget
    assert equal.seconds <= (1 + equal_layers.COST) * free.seconds
    assert (equal.binding, equal.prices) == (free.binding, free.prices)


def test_where_it_costs_more_the_layers_differ(problem, monkeypatch):
    monkeypatch.setattr(equal_layers, "COST", -1.0)
    free = decide(problem)
    assert with_equal_layers(problem, free, layers_of(problem)) is free


def test_layers_of_two_classes_have_homes_of_their_own(problem):
    equal = with_equal_layers(problem, decide(problem), layers_of(problem, lambda layer: layer // 4))
    assert all(len(homes(equal, place, half)) == 1 for place in range(PLACES) for half in (range(4), range(4, 8)))


def test_what_may_not_be_recomputed_is_not_for_the_sake_of_others():
    problem = stack(8, budget=12 * MIB, rate=1e8)
    first = replace(problem.activations[0], recompute_seconds=None)
    problem = replace(problem, activations=(first, *problem.activations[1:]))
    equal = with_equal_layers(problem, decide(problem), layers_of(problem))
    assert not equal.residency[first.name].recomputed


def test_of_few_layers_each_has_its_own_homes():
    problem = stack(FEWEST - 1, budget=5 * MIB)
    free = decide(problem)
    assert with_equal_layers(problem, free, layers_of(problem)) is free
