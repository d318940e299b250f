"""What a graph says of strides is what its ops make, whatever a pattern's examples were like."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.fx.facts import storage_of
from memo_compile.passes.transforms.true_layouts import tell_true_layouts

aten = torch.ops.aten


def heads(x):
    return (x.view(1, 16, 4, 8).permute(0, 2, 1, 3).view(4, 16, 8) * 2).sin()


def told(fn, *tensors):
    """A graph all of whose values are said to be dense, and then not any more."""
    gm = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    for node in gm.graph.find_nodes(op="call_function", target=aten.view.default)[1:]:
        node.meta["val"] = node.meta["val"].contiguous()
    return tell_true_layouts(gm)


def test_strides_are_those_of_the_operands_and_all_that_follows():
    gm = told(heads, torch.randn(16, 32))
    strides = [n.meta["val"].stride() for n in gm.graph.nodes if n.op == "call_function"]
    assert strides[2:] == [(8, 32, 1)] * 3


def test_a_view_that_strides_do_not_allow_is_one_of_a_copy():
    def joined(x):
        return x.permute(1, 0).contiguous().view(-1).sin()

    x = torch.randn(3, 5)
    gm = make_fx(joined, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    (clone,) = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    clone.replace_all_uses_with(clone.args[0])  # as a pattern does that thinks its operand dense
    gm.graph.erase_node(clone)
    tell_true_layouts(gm)
    (view,) = gm.graph.find_nodes(op="call_function", target=aten.view.default)
    assert storage_of(view).target is aten.clone.default
    torch.testing.assert_close(gm(x), joined(x))


def test_random_draws_and_what_tells_no_shape_are_left_as_they_are():
    def drawn(x):
        return aten.bernoulli.p(x, 0.5), x + 1

    gm = make_fx(drawn, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(4))
    before = [n.meta.get("val") for n in gm.graph.nodes]
    assert all(
        a is b for a, b in zip(before, [n.meta.get("val") for n in tell_true_layouts(gm).graph.nodes], strict=True)
    )
