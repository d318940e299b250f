"""What the two graphs hand on to each other once homes are in place."""

import pytest
import torch

from memo_compile.passes.transforms.slices import UNCHECKED
from memo_compile.planning.planner import decide
from memo_compile.trace.offline import trace
from memo_compile.trace.setting import limits_for


class KeptBySelf(torch.autograd.Function):
    """Keeps a tensor on its context, without `save_for_backward`."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.cumsum(1)
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.kept


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.second(KeptBySelf.apply(torch.sin(self.first(x)))).square().mean()


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 checks all of them")
def test_what_an_autograd_function_keeps_by_itself_comes_last():
    p, setting = trace(Model(), (torch.zeros(1024, 32),), {}, {"offload": "all"})
    for node in (*p.joint.graph.nodes, *p.forward.graph.nodes):  # of all that is saved, the weights
        if node.op == "placeholder" and "tangents" not in node.name and node.meta["val"].shape == (32, 32):
            node.meta[UNCHECKED] = True
    decided = decide(p, limits_for(setting, p.unplanned_peak), name="model", backend="memo")
    (output,) = decided.forward.graph.find_nodes(op="output")
    handed_on = output.args[0][p.num_forward_outputs :]
    unchecked = [UNCHECKED in n.meta for n in handed_on]
    assert True in unchecked
    assert unchecked == sorted(unchecked)
    assert tuple(n.name for n in handed_on) == decided.saved
    received = decided.backward.graph.find_nodes(op="placeholder")[: len(handed_on)]
    assert [n.meta["val"].shape for n in received] == [n.meta["val"].shape for n in handed_on]
    assert [n.name for n, m in zip(received, handed_on, strict=True) if m.op == "placeholder"] == [
        n.name for n in handed_on if n.op == "placeholder"
    ]
