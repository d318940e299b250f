"""How many calls of one graph are to be expected, as far as modules tell."""

import pytest
import torch
from torch import nn

import memo_compile


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return torch.sin(self.layer(x))


def stack(*widths):
    return nn.Sequential(*(nn.Sequential(Block(w)) for w in widths))


OPTIONS = {"memory_budget": "min"}


def calls(model, width=32):
    model(torch.ones(8, width)).sum().backward()
    return [plan.calls for plan in memo_compile.plans()]


@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_blocks_of_one_model_that_are_compiled_alone(way):
    model = stack(32, 32, 32)
    for part in model:
        if way == "in place":
            part[0].compile(backend="memo_eager", options=OPTIONS)
        else:
            part[0] = torch.compile(part[0], backend="memo_eager", options=OPTIONS)
    assert calls(model)[0] == 3


def test_another_model_and_other_sizes_do_not_count():
    models = [stack(32), stack(32), stack(64)]
    for model in models:
        model.compile(backend="memo_eager", options=OPTIONS)
    assert calls(models[0]) == [1]


def test_parts_of_one_compiled_model_between_graph_breaks():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(32) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                torch._dynamo.graph_break()
                x = block(x)
            return x

    assert max(calls(torch.compile(Broken(), backend="memo_eager", options=OPTIONS))) == 3
