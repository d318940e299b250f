"""Training loops with lengths as they come: what one plan for a range must be right for beside a step at a time."""

import pytest
import torch
import zoo
from torch import nn

import memo_compile
from memo_compile.errors import TooManyCalls

LENGTHS = (128, 127, 33, 34, 40, 47, 64, 65, 90, 96, 100, 111)  # of one range, its ends included


class Block(nn.Module):
    """Rows that mix along the tokens, and much that is saved."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, x):
        x = x + torch.cumsum(x, 1) / x.shape[1]
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def models(**options):
    model, reference = Model().double(), Model().double()
    model.compile(backend="memo_eager", options=options, dynamic=True)
    return model, reference


def assert_same_gradients(model, reference):
    zoo.assert_close(*({n: p.grad for n, p in m.named_parameters()} for m in (model, reference)), share=1e-12)


def moved():
    return sum(p.offloaded_bytes + p.recomputed_bytes for p in memo_compile.plans())


def test_outstanding_calls_of_different_lengths():
    model, reference = models(memory_budget="min")
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        for m in (model, reference):
            losses = [m(zoo.batch(1, n)) for n in (128, 33, 90)]
            for i in order:
                losses[i].backward()
        assert_same_gradients(model, reference)
    assert len(memo_compile.plans()) == 1
    assert moved() > 0


def test_evaluation_between_training_steps():
    model, reference = models(memory_budget="min")
    for n in (100, 40, 128):
        for m in (model, reference):
            m.zero_grad()
            m(zoo.batch(1, n)).backward()
        assert_same_gradients(model, reference)
        with torch.no_grad():
            for other in (n - 7, 2 * n):
                torch.testing.assert_close(model(zoo.batch(1, other)), reference(zoo.batch(1, other)))
    assert len(memo_compile.plans()) == 1


def test_blocks_that_are_compiled_alone_share_one_plan_for_all_lengths():
    model, reference = Model(3).double(), Model(3).double()
    for block in model.blocks:
        block.compile(backend="memo_eager", options={"offload": "all"}, dynamic=True)
    for n in (100, 40, 128):
        for m in (model, reference):
            m.zero_grad()
            m(zoo.batch(1, n)).backward()
        assert_same_gradients(model, reference)
    assert [p.range.rsplit(" in ", 1)[1] for p in memo_compile.plans()] == ["[33, 128]"]
    assert moved() > 0


def test_a_budget_in_bytes_is_kept_at_every_length():
    least, _ = models(memory_budget="min")
    least(zoo.batch(1, 128))
    (plan,) = memo_compile.plans()
    torch._dynamo.reset()
    budget = (plan.predicted_peak + plan.unplanned_peak) // 2
    model, reference = models(memory_budget=budget)
    for n in LENGTHS:
        for m in (model, reference):
            m.zero_grad(set_to_none=True)
            m(zoo.batch(1, n)).backward()
        assert_same_gradients(model, reference)
        model.zero_grad(set_to_none=True)
        assert memo_compile.measure_peak(lambda n=n: model(zoo.batch(1, n)).backward()) <= budget
    plan = memo_compile.plans()[-1]
    assert plan.range.endswith("[33, 128]")
    assert plan.offloaded_bytes or plan.recomputed_bytes


def test_calls_that_would_exceed_a_budget_beside_those_that_wait_are_refused():
    alone = Model().double()
    budget = 3 * memo_compile.measure_peak(lambda: alone(zoo.batch(1, 128)).backward())
    model, reference = models(memory_budget=budget)
    waiting = []

    def call(lengths):
        for n in lengths:
            waiting.append((n, model(zoo.batch(1, n))))  # noqa: PERF401

    def call_until_refused():
        with pytest.raises(TooManyCalls, match=r'options=\{"calls": '):
            call(10 * (128, 33, 90))

    assert memo_compile.measure_peak(call_until_refused) <= budget
    assert len(waiting) > 1
    for n, loss in waiting:
        loss.backward()
        reference(zoo.batch(1, n)).backward()
    assert_same_gradients(model, reference)
    model(zoo.batch(1, 128))  # those that have had their backward do not count
