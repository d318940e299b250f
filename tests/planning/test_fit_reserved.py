"""With a budget for what is reserved, the target falls by what the allocator's heap wastes."""

import logging
from types import SimpleNamespace

import pytest

from memo_compile.errors import BudgetTooSmall
from memo_compile.planning.fit_budget import Fitted
from memo_compile.planning.fit_reserved import fit_reserved
from memo_compile.planning.problem import Limits


class Fits:
    """Plans that allocate what they may, down to `least`, of `all_of_it`. The evidence is the peak."""

    def __init__(self, all_of_it, least=0):
        self.asked, self.all_of_it, self.least = [], all_of_it, least

    def __call__(self, limits):
        self.asked.append(limits.budget)
        if limits.budget is not None and limits.budget < self.least:
            raise BudgetTooSmall(limits.budget, self.least, {})
        peak = self.all_of_it if limits.budget is None else min(limits.budget, self.all_of_it)
        plan = SimpleNamespace(name="graph_0", least_peak=self.least)
        return Fitted(SimpleNamespace(plan=plan), peak, peak, rounds=1)


def wasting(times):
    return lambda peak: int(times * peak)


def test_a_plan_for_which_enough_is_there_is_taken_as_it_is():
    fits = Fits(all_of_it=700)
    fitted, taken = fit_reserved(fits, Limits(budget=1000, host=0), wasting(1.2))
    assert (fitted.peak, taken, fits.asked) == (700, 840, [1000])


def test_what_is_reserved_stays_within_the_budget():
    fits = Fits(all_of_it=5000)
    fitted, taken = fit_reserved(fits, Limits(budget=1000, host=0), wasting(1.25))
    assert (fitted.peak, taken, fits.asked) == (784, 980, [1000, 784])
    assert fitted.rounds == 2


def test_a_smaller_plan_may_waste_more():
    fits = Fits(all_of_it=5000)
    fitted, taken = fit_reserved(fits, Limits(budget=1000, host=0), lambda peak: int(peak * 1.25) + (peak < 800) * 40)
    assert fits.asked == [1000, 784, 753]
    assert (fitted.peak, taken) == (753, 981)


def test_where_no_plan_is_small_enough_the_least_is_taken_and_said(caplog):
    """It runs: the allocator gives back what it does not use, and goes on."""
    fits = Fits(all_of_it=5000, least=900)
    with caplog.at_level(logging.WARNING, "memo_compile"):
        fitted, taken = fit_reserved(fits, Limits(budget=1000, host=0), wasting(1.5))
    assert (fitted.peak, taken, fits.asked) == (900, 1350, [1000, 900])
    assert "expandable_segments:True" in caplog.text


def test_what_cannot_be_allocated_is_refused():
    with pytest.raises(BudgetTooSmall):
        fit_reserved(Fits(all_of_it=5000, least=2000), Limits(budget=1000, host=0), wasting(1.0))


def test_without_a_budget_nothing_is_lowered():
    fits = Fits(all_of_it=5000)
    assert fit_reserved(fits, Limits(budget=None, host=0), wasting(2.0))[1] == 10000
    assert fits.asked == [None]
