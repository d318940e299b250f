"""What the first step is seen to hold, against the budget: planned again once, or refused with the op that took it."""

import pytest
import torch
from torch import nn

import memo_compile
from memo_compile.errors import BudgetExceeded

ROWS, WIDTH, LAYERS = 2048, 32, 8
ONE = ROWS * WIDTH * 4


def scratch_of(times):
    """An op of somebody else's that takes `times` its operand for itself: nobody knows before it has run."""

    @torch.library.custom_op(f"test_kept_budgets::takes_{times}", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(times, 1).view(times, *x.shape)[0].clone()

    op.register_fake(torch.empty_like)
    return op


class Model(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x))
        return (x + self.op(x.detach())).square().mean()


def compiled(times, backend, budget):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(scratch_of(times))
    fn = torch.compile(model, backend=backend, options={"memory_budget": budget})
    x = torch.randn(ROWS, WIDTH)

    def step():
        model.zero_grad(set_to_none=True)
        fn(x).backward()
        return [p.grad for p in model.parameters()]

    return model, x, step


@pytest.mark.parametrize("backend", ["memo_eager", "memo"])
def test_a_plan_is_made_again_with_what_the_first_step_showed(backend, caplog):
    budget = 10 * ONE
    model, x, step = compiled(5 if backend == "memo" else 6, backend, budget)
    step()
    step()  # planned again
    first, second = (r for r in caplog.records if "planned again with what was seen" in r.getMessage()), step()
    assert len(list(first)) == 1
    model.zero_grad(set_to_none=True)
    assert memo_compile.measure_peak(step) <= 1.01 * budget
    plan = memo_compile.plans()[-1]
    assert any("takes_" in w.op and w.how == "seen in a step" for w in plan.workspaces)
    model.zero_grad(set_to_none=True)
    model(x).backward()
    for got, p in zip(second, model.parameters(), strict=True):
        assert (got - p.grad).norm() <= 1e-5 * p.grad.norm()


def test_what_no_plan_can_mend_is_refused_with_the_op():
    _, _, step = compiled(30, "memo_eager", 12 * ONE)
    step()
    with pytest.raises(BudgetExceeded, match="test_kept_budgets::takes_30") as refusal:
        step()
    assert refusal.value.held > refusal.value.taken >= 29 * ONE


def test_other_ranks_would_have_another_plan(monkeypatch):
    _, _, step = compiled(7, "memo_eager", 10 * ONE)
    step()
    monkeypatch.setattr("memo_compile.runtime.kept_budgets._ranks", lambda: 2)
    with pytest.raises(BudgetExceeded, match="test_kept_budgets::takes_7"):
        step()


def test_an_excess_that_no_op_explains_is_told_and_ends_nothing(caplog, monkeypatch):
    """Hooks, other graphs and other threads allocate within a step too."""
    from memo_compile.runtime.first_step import FirstStep, Overrun
    from memo_compile.runtime.kept_budgets import kept

    monkeypatch.setattr("memo_compile.runtime.first_step._judged", lambda *_: Overrun(100, 150, {}))
    step = FirstStep("graph_0", asks=True)
    run = kept(step.forward(lambda x: x + 1), step, lambda *_: pytest.fail("planned again without news"))
    backward = step.backward(lambda args: args)
    assert run(1) == 2
    backward([1])
    assert step.has_overrun
    assert run(1) == 2
    assert not step.has_overrun
    assert [r.getMessage() for r in caplog.records if "no op is seen to have taken it" in r.getMessage()]
