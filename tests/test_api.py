"""The functions beside `torch.compile`: what they leave behind, and what they leave out."""

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
