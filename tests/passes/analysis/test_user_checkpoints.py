"""A user's own checkpoints: suggestions are memo's to weigh, and what a policy says must be is kept."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import memo_compile

ROWS, WIDTH = 512, 16


class Blocks(nn.Module):
    def __init__(self, wrap, wider, count):
        super().__init__()
        self.wrap = wrap
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, wider * WIDTH), nn.GELU(), nn.Dropout(0.2), nn.Linear(wider * WIDTH, WIDTH))
            for _ in range(count)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + self.wrap(block, x)
        return x.square().mean()


def plain(block, x):
    return checkpoint(block, x, use_reentrant=False)


def of_matmuls(policy):
    """A checkpoint whose policy is `policy` for matmuls, and a suggestion for all else."""

    def choose(ctx, op, *args, **kwargs):
        return policy if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, choose)
    return lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def trained(wrap, backend, wider=4, count=4, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Blocks(wrap, wider, count).double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    torch.manual_seed(1)
    torch.compile(model, backend=backend, **({"options": options} if options else {}))(x).backward()
    return [p.grad for p in model.parameters()]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def test_with_checkpoints_the_least_is_what_it_is_without_and_gradients_are_right():
    shape = {"wider": 1, "count": 12}  # torch keeps what each block begins with
    trained(lambda block, x: block(x), "memo_eager", **shape, memory_budget="min")
    without = memo_compile.plans()[-1]
    got = trained(plain, "memo_eager", **shape, memory_budget="min")
    plan = memo_compile.plans()[-1]
    assert_equal(got, trained(lambda block, x: block(x), "aot_eager", **shape))
    assert plan.predicted_peak <= 1.05 * without.predicted_peak
    assert plan.unplanned_peak < without.unplanned_peak  # what a ratio is of: as torch holds it, with the checkpoints


@pytest.mark.parametrize("policy", ["MUST_SAVE", "MUST_RECOMPUTE", "MUST_CPU_OFFLOAD"])
def test_what_a_policy_says_must_be_is_kept(policy):
    got = trained(of_matmuls(CheckpointPolicy[policy]), "memo_eager", memory_budget="min")
    assert_equal(got, trained(lambda block, x: block(x), "aot_eager"))
    wide = [a for a in memo_compile.plans()[-1].activations if a.name.startswith("addmm") and a.shape[-1] == 4 * WIDTH]
    residency = {(a.kept, a.offloaded, a.recomputed) for a in wide}
    if policy == "MUST_RECOMPUTE":
        assert not wide
    elif policy == "MUST_SAVE":
        assert residency == {(1, 0, 0)}
    else:
        assert residency == {(0, ROWS, 0)}


def test_what_must_be_offloaded_is_also_where_everything_fits():
    trained(of_matmuls(CheckpointPolicy.MUST_CPU_OFFLOAD), "memo_eager")
    assert memo_compile.plans()[-1].offloaded_bytes > 0
