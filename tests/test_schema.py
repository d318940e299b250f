"""A plan goes to JSON and back."""

import pytest
import torch
import zoo

import memo_compile
from memo_compile.schema import Plan


def test_a_plan_reads_back_equal():
    plan = memo_compile.plan(zoo.make("llama"), (zoo.batch(1),), {"labels": zoo.batch(1)}, {"memory_budget": "min"})
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version"):
        Plan.from_json('{"version": 99}')


def test_a_plan_says_where_each_activation_comes_from_and_where_it_goes():
    model, x = zoo.make("llama"), zoo.batch(1)
    plan = memo_compile.plan(model, (x,), {"labels": x}, {"memory_budget": "min"})
    assert all(p.grad is None for p in model.parameters())
    assert plan.activations
    for a in plan.activations:
        assert a.kept + a.offloaded + a.recomputed == a.tokens
        assert a.bytes == torch.empty(a.shape, dtype=getattr(torch, a.dtype)).nbytes
    assert any("llama.py" in a.source for a in plan.activations)
    assert plan.predicted_peak < plan.unplanned_peak


@pytest.mark.parametrize("text", ["[]", "3", '{"version": 1}', "{}"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"plan"):
        Plan.from_json(text)
