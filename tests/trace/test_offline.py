"""Planning without running: what a trace costs."""

import pytest
import torch

from memo_compile import plan
from memo_compile.errors import MemoError
from memo_compile.models import GPT, GPTConfig
from memo_compile.trace.offline import trace


def test_an_unplanned_step_takes_as_long_as_what_it_computes():
    model = GPT(GPTConfig(vocab=64, layers=2, width=64, heads=4, tokens=256))
    x = torch.zeros(1, 256, dtype=torch.int64)
    p, _ = trace(model, (x,), {"labels": x}, {"hardware": "a800"})
    graphs = (p.unplanned.forward, p.unplanned.backward)
    computed = [p.seconds[n.name] for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    made = plan(model, (x,), {"labels": x}, {"hardware": "a800"})
    assert made.predicted_seconds == pytest.approx(sum(computed))


@pytest.mark.parametrize("options", [{"memory_budget": "min"}, {"memory_budget": "min", "offload": False}])
def test_masks_of_dropout_are_made_again_from_seeds(options):
    model = GPT(GPTConfig(vocab=64, layers=2, width=64, heads=4, tokens=256, dropout=0.1)).train()
    x = torch.zeros(1, 256, dtype=torch.int64)
    assert plan(model, (x,), {"labels": x}, options).predicted_peak < plan(model, (x,), {"labels": x}).predicted_peak


def test_every_plan_says_what_the_least_would_be():
    model = GPT(GPTConfig(vocab=64, layers=2, width=64, heads=4, tokens=256))
    x = torch.zeros(1, 256, dtype=torch.int64)
    least = plan(model, (x,), {"labels": x}, {"memory_budget": "min"})
    assert least.least_peak == least.predicted_peak
    for budget in (1.0, 0.9):
        made = plan(model, (x,), {"labels": x}, {"memory_budget": budget})
        assert 0 < made.least_peak <= made.predicted_peak
        assert made.least_peak == pytest.approx(least.predicted_peak, rel=0.05)


def test_what_makes_no_graph_with_gradients_is_refused():
    def broken(x):
        torch._dynamo.graph_break()
        return x.sum()

    with pytest.raises(MemoError, match="one graph"):
        plan(broken, (torch.ones(3, requires_grad=True),))
    with pytest.raises(MemoError, match="no gradient"):
        plan(lambda x: x.sum(), (torch.ones(3),))
