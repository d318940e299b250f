"""Matmuls whose sum comes much later stay where the plan has them, and the sum stays the same."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.transforms.matmuls import FAR, keep_early_matmuls


def traced(steps):
    def fn(a, b, c):
        matmul = a @ b
        for _ in range(steps):
            c = c.sin()
        return matmul + c

    inputs = [torch.randn(8, 8, dtype=torch.float64) for _ in range(3)]
    return make_fx(fn, tracing_mode="fake")(*inputs), inputs


def sums_of_matmuls(gm):
    adds = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    return [n for n in adds if any(a.target is torch.ops.aten.mm.default for a in n.all_input_nodes)]


def test_a_far_sum_no_longer_reads_the_matmul_itself():
    gm, inputs = traced(FAR + 2)
    expected = gm(*inputs)
    keep_early_matmuls(gm)
    assert not sums_of_matmuls(gm)
    assert torch.equal(gm(*inputs), expected)


def test_a_sum_with_more_dimensions_is_left_alone():
    """No matmul takes it in, and the view would be of another dimension."""

    def fn(a, b, c):
        matmul = a @ b
        for _ in range(FAR + 2):
            c = c.sin()
        return (matmul + c).softmax(1)

    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((8, 8), (8, 8), (1, 8, 8))]
    gm = make_fx(fn, tracing_mode="fake")(*inputs)
    assert torch.equal(keep_early_matmuls(gm)(*inputs), fn(*inputs))


def test_a_near_sum_is_left_to_be_fused():
    gm, _ = traced(2)
    assert sums_of_matmuls(keep_early_matmuls(gm))
