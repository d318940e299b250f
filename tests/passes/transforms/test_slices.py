"""What the two graphs hand on to each other once homes are in place."""

import pytest
import torch

from memo_compile.passes.fx.meta import UNCHECKED
from memo_compile.passes.transforms.partition import Split, received
from memo_compile.passes.transforms.slices import _in_torchs_order
from memo_compile.planning.decide import decide
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


class Opaque:
    """Stands for an object that is no tensor: a DeviceMesh, a generator."""


def test_values_of_all_kinds_are_handed_on_in_torchs_order():
    """Among the saved values lie an object and a number, and what is offloaded adds more after them."""

    def graph(inputs, results):
        made = torch.fx.Graph()
        nodes = {name: made.placeholder(name) for name in inputs}
        for name, node in nodes.items():
            node.meta["val"] = {"mesh": Opaque(), "size": 3}.get(name, torch.empty(2))
            node.meta.update({UNCHECKED: True} if name == "kept_by_self" else {})
        made.output(tuple(nodes[name] for name in results))
        return torch.fx.GraphModule(torch.nn.Module(), made)

    given = ["kept_by_self", "mesh", "x", "size", "y"]
    forward = graph(given, ["x", *given])
    backward = graph(["size", "kept_by_self", "mesh", "x", "y", "tangents_1"], ["tangents_1"])
    split = Split(forward, backward, tuple(given), 1)
    in_order = _in_torchs_order(split, split.saved)
    (output,) = forward.graph.find_nodes(op="output")
    assert [n.name for n in output.args[0]] == ["x", "x", "y", "kept_by_self", "mesh", "size"]
    assert in_order == ("x", "y", "kept_by_self", "mesh", "size")
    names = [n.name for n in backward.graph.find_nodes(op="placeholder")]
    assert names == ["size", "x", "y", "kept_by_self", "mesh", "tangents_1"]
    assert [n.name for n in received(backward, 5)] == list(in_order)
