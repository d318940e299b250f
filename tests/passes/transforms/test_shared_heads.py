"""Attention on the CPU reads keys and values once for a group of query heads, where a model has repeated them."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.transforms.attention import write_over_attention_inputs
from memo_compile.passes.transforms.shared_heads import share_heads
from memo_compile.runtime.ops import register

register()
aten = torch.ops.aten
KERNEL = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ROWS, SIZE = 20, 8


def values(heads, *, rows=ROWS):
    return torch.randn(2, rows, heads, SIZE, dtype=torch.float64).transpose(1, 2)


def given(heads, shared):
    torch.manual_seed(0)
    return values(heads), values(heads), values(shared), values(shared)


def beside_each_other(x, group):
    """As `repeat_interleave` and Hugging Face's `repeat_kv` do."""
    batch, heads, rows, size = x.shape
    return x[:, :, None].expand(batch, heads, group, rows, size).reshape(batch, heads * group, rows, size)


def one_after_the_other(x, group):
    """All heads, and all once more: each query head has another one's keys."""
    batch, heads, rows, size = x.shape
    return x[:, None].expand(batch, group, heads, rows, size).reshape(batch, heads * group, rows, size)


def step(repeat, summed=True):
    def run(g, q, k, v):
        batch, shared, rows, size = k.shape
        group = q.shape[1] // shared
        q, k, v = q * 1.0, k * 1.0, v * 1.0
        keys, wide = repeat(k, group), repeat(v, group)
        out, sums = KERNEL(q, keys, wide, 0.0, True)
        dq, dk, dv = BACKWARD(g, q, keys, wide, out, sums, 0.0, True)
        if summed:
            dk, dv = (t.view(batch, shared, group, rows, size).sum(2) for t in (dk, dv))
        return out, dq, dk, dv

    return run


def heads_of_keys(gm):
    """Of the forward, and of the backward."""
    found = {n.target: n for n in gm.graph.find_nodes(op="call_function", target=KERNEL)}
    found |= {n.target: n for n in gm.graph.find_nodes(op="call_function", target=BACKWARD)}
    return [int(found[t].args[at].meta["val"].shape[1]) for t, at in ((KERNEL, 1), (BACKWARD, 2))]


def traced(fn, tensors):
    return make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)


@pytest.mark.parametrize(("heads", "shared"), [(8, 2), (6, 3), (4, 1), (12, 2)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_group_shares_its_keys(heads, shared, in_place):
    """In pieces, too: of whole groups, and of some heads of one."""
    tensors = given(heads, shared)
    gm = traced(step(beside_each_other), tensors)
    wanted = gm(*tensors)
    assert heads_of_keys(share_heads(gm)) == [shared, shared]
    if in_place:
        gm.graph.eliminate_dead_code()
        write_over_attention_inputs(gm)
        assert gm.graph.find_nodes(op="call_function", target=torch.ops.memo.attention_backward_onto.default)
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fn", "kept"),
    [(step(one_after_the_other), [8, 8]), (step(beside_each_other, summed=False), [2, 8])],
)
def test_what_is_repeated_or_read_otherwise_stays(fn, kept):
    tensors = given(8, 2)
    gm = traced(fn, tensors)
    wanted = gm(*tensors)
    assert heads_of_keys(share_heads(gm)) == kept
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "shared", "can"), [(8, 2, True), (4, 1, True), (6, 3, False)])
def test_keys_and_values_that_few_heads_share_are_copied_where_they_are_read_later(heads, shared, can):
    """So that gradients replace the queries all the same; not where copies would take more than half of these."""

    def run(*args):
        return step(beside_each_other)(*args)[1:]

    tensors = given(heads, shared)
    gm = share_heads(traced(run, tensors))
    gm.graph.eliminate_dead_code()
    (node,) = gm.graph.find_nodes(op="call_function", target=BACKWARD)
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *node.args[2:4]),)  # keys and values are returned as well
    gm.recompile()
    wanted = gm(*tensors)
    write_over_attention_inputs(gm)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.memo.keep.default)) == (2 if can else 0)
    assert bool(gm.graph.find_nodes(op="call_function", target=torch.ops.memo.attention_backward_onto.default)) is can
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)


def test_keys_that_are_values_are_copied_once_for_each():
    """Their gradients are two."""

    def run(g, q, k, v):
        return step(beside_each_other)(g, q, k, k)[1:]

    tensors = given(8, 2)
    gm = share_heads(traced(run, tensors))
    gm.graph.eliminate_dead_code()
    (node,) = gm.graph.find_nodes(op="call_function", target=BACKWARD)
    node.args = (*node.args[:3], node.args[2], *node.args[4:])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    wanted = gm(*tensors)
    write_over_attention_inputs(gm)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.memo.attention_backward_onto.default)
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)
