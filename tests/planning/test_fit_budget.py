"""The closed loop between a plan and what it is found to hold."""

from dataclasses import replace
from functools import partial

import pytest
import zoo

from memo_compile.errors import BudgetTooSmall
from memo_compile.planning.decide import decide
from memo_compile.planning.fit_budget import LESS, ROUNDS, fit_budget
from memo_compile.trace.offline import trace
from memo_compile.trace.setting import limits_for


@pytest.fixture(scope="module")
def traced():
    model, x = zoo.one_layer_llama(), zoo.batch(1)
    p, setting = trace(model, (x,), {"labels": x}, {"hardware": "h100", "memory_budget": "min"})
    return p, limits_for(setting, p.unplanned_peak)


def fitted(p, limits, peak_of):
    """What is chosen where `peak_of` says what a plan holds, with the plans it was asked about."""
    asked = []

    def evaluate(decided):
        asked.append(decided)
        return peak_of(decided), None

    return fit_budget(p, limits, partial(decide, p, name="model", backend="memo"), evaluate), asked


def test_the_least_plan_is_taken_where_it_holds_less(traced):
    p, limits = traced
    found, asked = fitted(p, limits, lambda d: p.unplanned_peak // 2)
    assert found.decided.residency
    assert len(asked) == 1


def test_the_unplanned_graph_is_the_least_where_no_plan_holds_less(traced):
    """Offloading a small model gains less than what a compiler no longer fuses."""
    p, limits = traced
    found, asked = fitted(p, limits, lambda d: p.unplanned_peak - bool(not d.residency))
    assert not found.decided.residency
    assert found.peak == p.unplanned_peak - 1
    assert len(asked) == 3


def test_where_the_least_plan_holds_more_than_predicted_others_are_looked_at(traced):
    """While they hold less; with what it holds the first is above seven tenths of the unplanned graph's peak."""
    p, limits = traced
    shares, targets = [1.0, 0.97, 0.98, 2.0], []

    def peak_of(decided):
        targets.append(decided.limits.budget)
        return int(shares[len(targets) - 1] * p.unplanned_peak)

    found, _ = fitted(p, limits, peak_of)
    assert targets == [None, int(LESS * p.unplanned_peak), int(LESS * int(0.97 * p.unplanned_peak)), None]
    assert found.peak == int(0.97 * p.unplanned_peak)
    assert found.decided.limits == replace(limits, tiles=1)
    assert found.decided.plan.budget is None


@pytest.mark.parametrize(("share", "looked_at"), [(1.0, [16]), (0.85, [16, 4])])
def test_fewer_tiles_are_looked_at_where_the_model_misjudges_the_most(traced, monkeypatch, share, looked_at):
    p, limits = traced
    monkeypatch.setattr("memo_compile.planning.fit_budget._worthwhile", lambda p, limits: [(4, 0), (16, 0)])
    tiles, peaks = [], []

    def peak_of(decided):
        tiles.append(decided.limits.tiles)
        peaks.append(peaks[0] - 1 if peaks else int(share * decided.plan.predicted_peak))
        return peaks[-1]

    found, _ = fitted(p, replace(limits, tiles="auto"), peak_of)
    assert tiles == looked_at
    assert found.decided.limits.tiles == looked_at[-1]


@pytest.mark.parametrize("unplanned_holds", [0, 2])
def test_of_equal_peaks_what_holds_less_between_forward_and_backward_is_taken(traced, monkeypatch, unplanned_holds):
    p, limits = traced
    between = "memo_compile.planning.fit_budget.held_between"
    monkeypatch.setattr(between, lambda graph: unplanned_holds if graph is p.unplanned.forward else 1)
    found, asked = fitted(p, limits, lambda d: p.unplanned_peak)
    assert len(asked) == 3
    assert bool(found.decided.residency) == (unplanned_holds > 1)


def test_a_missed_budget_is_aimed_at_again_lower(traced):
    p, limits = traced
    budget = int(0.8 * p.unplanned_peak)
    targets = []

    def excess(decided):
        targets.append(decided.limits.budget)
        return budget + 1000 * (len(targets) < ROUNDS)

    found, _ = fitted(p, replace(limits, budget=budget, objective="time"), excess)
    assert found.rounds == ROUNDS
    assert budget > targets[0] > targets[1] + 1000


def test_a_budget_that_no_plan_keeps_is_refused_with_what_was_found(traced):
    p, limits = traced
    with pytest.raises(BudgetTooSmall) as caught:
        fitted(
            p,
            replace(limits, budget=p.unplanned_peak // 2, objective="time"),
            lambda d: p.unplanned_peak + bool(d.residency),
        )
    assert caught.value.least == p.unplanned_peak  # of the unplanned graph, which has no homes
    assert any("llama.py" in line for line in caught.value.peak_tensors)


def test_the_smallest_plan_is_looked_at_once_where_none_keeps_the_target(traced):
    p, limits = traced
    known, _ = fitted(p, limits, lambda d: p.unplanned_peak // 2)
    shared = replace(limits, budget=1, objective="time", promised=False)  # a share of a whole
    found, asked = fitted(p, shared, lambda d: p.unplanned_peak // 2)
    assert len(asked) == 1
    assert found.decided.residency == known.decided.residency
    found, asked = fitted(p, shared, lambda d: p.unplanned_peak - bool(not d.residency))
    assert [bool(d.residency) for d in asked] == [True, True, False]
    assert not found.decided.residency
