"""Budgets, kept in measured bytes or refused with numbers."""

import pytest
import torch
import zoo

import memo_compile


def peak_at(budget, **options):
    torch._dynamo.reset()
    model, x = zoo.make("llama"), zoo.batch(3)
    fn = torch.compile(model, backend="memo", options={"memory_budget": budget, **options})
    fn(x, labels=x).backward()
    model.zero_grad(set_to_none=True)
    return memo_compile.measure_peak(lambda: fn(x, labels=x).backward()), memo_compile.plans()[-1]


def test_budgets_are_kept_and_a_smaller_one_never_holds_more():
    peaks = []
    for budget in (1.0, 0.65, "min"):
        measured, plan = peak_at(budget)
        assert plan.budget is None or measured <= plan.budget
        assert measured == pytest.approx(plan.predicted_peak, rel=0.05)
        assert plan.rounds <= 3
        peaks.append(measured)
    assert peaks == sorted(peaks, reverse=True)


def test_an_impossible_budget_is_refused_with_numbers():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        peak_at("64KiB")
    refusal = caught.value.inner_exception
    assert isinstance(refusal, memo_compile.BudgetTooSmall)
    assert refusal.budget == 65536 < refusal.least
    assert f"{refusal.least:,}" in str(refusal)
    assert any("llama.py" in line for line in refusal.obstacles)


def test_the_least_that_a_refusal_names_can_run():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        peak_at("64KiB", offload=False)
    least = caught.value.inner_exception.least
    measured, _ = peak_at(least, offload=False)
    assert measured <= least


def test_the_process_grows_by_no_more_than_device_and_host_bytes():
    resource = pytest.importorskip("resource")
    model, x = zoo.make("llama"), zoo.batch(3)
    fn = torch.compile(model, backend="memo", options={"memory_budget": "min"})
    for _ in range(3):
        fn(x, labels=x).backward()
        model.zero_grad(set_to_none=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(10):
        fn(x, labels=x).backward()
        model.zero_grad(set_to_none=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    plan = memo_compile.plans()[-1]
    assert grown <= 1.1 * (plan.predicted_peak + plan.host_bytes)
