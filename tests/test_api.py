"""The functions beside `torch.compile`: what they leave behind, and what they leave out."""

import pytest
import torch
from torch import nn

import memo_compile


class TwoHeads(nn.Module):
    """Two results of which either could be a loss."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return torch.sigmoid(self.left(x)).sum(), torch.tanh(self.right(x)).sum()


def test_plan_leaves_no_dump_and_is_not_among_the_plans(tmp_path):
    made = len(memo_compile.plans())
    plan = memo_compile.plan(TwoHeads(), (torch.ones(4096, 32),), options={"dump": str(tmp_path / "dump")})
    assert not (tmp_path / "dump").exists()
    assert len(memo_compile.plans()) == made
    assert (plan.arena_bytes, plan.lower_bound, plan.coverage, plan.buffers) == (0, 0, 0, ())


def test_plan_gives_every_result_a_gradient():
    plan = memo_compile.plan(TwoHeads(), (torch.ones(4096, 32),))
    assert len(plan.activations) == 2  # one of either head


class WithLogits(nn.Module):
    """A head that returns a loss with its logits, as a mapping or a tuple; or the logits alone."""

    def __init__(self, returns):
        super().__init__()
        self.head, self.returns = nn.Linear(32, 4096), returns

    def forward(self, x):
        logits = self.head(x)
        loss = torch.logsumexp(logits, -1).mean()
        return {"mapping": {"loss": loss, "logits": logits}, "tuple": (loss, logits), "logits": logits}[self.returns]


@pytest.mark.parametrize("returns", ["mapping", "tuple"])
def test_loss_only_leaves_logits_to_evaluation(returns, caplog):
    torch.compiler.reset()
    model = WithLogits(returns)
    options = {"memory_budget": "min", "tiles": "auto"}
    with_logits = torch.compile(model, backend="memo_eager", options=options)(torch.ones(1, 512, 32))
    assert "memo_compile.loss_only" in caplog.text
    model = torch.compile(memo_compile.loss_only(model), backend="memo_eager", options=options)
    loss = model(torch.ones(1, 512, 32))
    whole, alone = memo_compile.plans()[-2:]
    assert len(loss) == 1
    assert alone.predicted_peak < whole.predicted_peak / 4
    key = "loss" if returns == "mapping" else 0
    torch.testing.assert_close(loss[key], with_logits[key])
    assert len(model.eval()(torch.ones(1, 512, 32))) == 2


def test_loss_only_refuses_a_model_without_one():
    with pytest.raises(memo_compile.MemoError, match="without a loss"):
        memo_compile.loss_only(WithLogits("logits"))(torch.ones(1, 2, 32))
