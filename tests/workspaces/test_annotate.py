"""What is counted for calls: in plans, by measurement, under both backends."""

import json

import pytest
import torch
from torch import nn

import memo_compile
from memo_compile.schema import Plan

WIDTH = 32
SCALARS = 2e-3  # of the peak: what a graph of a few MiB holds beside its tensors


def held_at(model, x, backend, budget):
    """Bytes that a step is measured to hold, and its plan."""
    torch.compiler.reset()
    step = torch.compile(model, backend=backend, fullgraph=True, options={"memory_budget": budget})
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run():
        for p in parameters:
            p.grad = None
        step(x).square().mean().backward()

    run()
    for p in parameters:
        p.grad = None
    return memo_compile.measure_peak(run), memo_compile.plans()[-1]


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(8, 8, 3, padding=1) for _ in range(3)).double()

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x


@pytest.mark.parametrize("backend", ["memo_eager", "memo"])
def test_the_scratch_of_convolutions_is_in_the_plan(backend):
    x = torch.randn(2, 8, 8, 8, 8, dtype=torch.float64)
    held, plan = held_at(Tower(), x, backend, "min")
    assert held <= (1 + SCALARS) * plan.predicted_peak <= 1.1 * held
    taken = {w.op for w in plan.workspaces if w.bytes > 10 * x.numel() * 8 and w.how == "measured"}
    assert taken == {"aten.convolution.default", "aten.convolution_backward.default"}
    assert Plan.from_json(plan.to_json()) == plan


class Within(nn.Module):
    """Wide layers that run inside of what `wrap` makes of a block."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH), nn.Tanh(), nn.Linear(8 * WIDTH, WIDTH)) for _ in range(2)
        ).double()

    def forward(self, x):
        for block in self.blocks:
            x = self.wrap(block, x)
        return x


@torch.compiler.nested_compile_region
def region(block, x):
    return x + block(x)


def cond(block, x):
    return torch.cond(x.sum() > 0, lambda x: x + block(x), lambda x: x - block(x), (x,))


def loop(block, x):
    """Three rounds of a loop whose body needs no gradient, and a layer after it."""
    scale = block[0].weight.detach().sum() * 0 + 1
    done = torch.zeros((), dtype=torch.int64)

    def body(i, y):
        return i + 1, (y.unsqueeze(-1) * y.unsqueeze(-2)).softmax(-1).sum(-1) * scale

    _, y = torch._higher_order_ops.while_loop(lambda i, y: i < 3, body, (done, x.detach()))
    return x + block(y)


@pytest.mark.parametrize("wrap", [region, cond, loop])
def test_what_runs_inside_of_other_graphs_is_in_the_plan(wrap):
    x = torch.randn(3, 128, WIDTH, dtype=torch.float64)
    held, plan = held_at(Within(wrap), x, "memo_eager", "min")
    assert held <= (1 + SCALARS) * plan.predicted_peak <= 1.1 * held


def test_a_refusal_names_the_op_that_takes_most():
    x = torch.randn(2, 8, 8, 8, 8, dtype=torch.float64)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"for itself, aten\.convolution_backward"):
        held_at(Tower(), x, "memo_eager", 200_000)


def test_plans_that_were_written_before_workspaces_were_known_are_read():
    held_at(Within(region), torch.randn(3, 16, WIDTH, dtype=torch.float64), "memo_eager", "min")
    plan = memo_compile.plans()[-1]
    raw = json.loads(plan.to_json())
    del raw["workspaces"]
    assert Plan.from_json(json.dumps(raw)).workspaces == ()
