"""What a fusing compiler keeps out of memory, and what op by op lies there."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile import measure_peak
from memo_compile.passes.analysis.liveness import WORKSPACE, lifetimes, reaches_memory
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.build import call
from memo_compile.passes.transforms.attention import write_over_attention_inputs
from memo_compile.passes.transforms.token_slices import slice_value, sliced_copy


def scattered(index_size):
    """The gradient of a cross entropy as it is traced: -1 written into rows of zeros, and a matmul."""

    def gradient(index, scale):
        zeros = torch.ops.aten.full.default([8, 16], 0.0)
        return torch.ops.aten.scatter.value(zeros, 1, index, -1.0) * scale

    return make_fx(gradient)(torch.zeros(8, index_size, dtype=torch.int64), torch.ones(8, 16))


@pytest.mark.parametrize(("index_size", "stored"), [(1, False), (2, True)])
def test_a_one_hot_row_is_a_comparison_to_inductor(index_size, stored):
    (node,) = scattered(index_size).graph.find_nodes(op="call_function", target=torch.ops.aten.scatter.value)
    assert reaches_memory(node) == stored
    assert reaches_memory(node.args[0]) == stored


@pytest.mark.parametrize(("batch", "copied"), [(1, 0), (3, 16 * 8 * 8)])
def test_rows_of_a_batch_are_copied_to_be_read_in_another_shape(batch, copied):
    """A batch's rows [16, 32) lie apart: as one dimension they are a copy, which op by op takes memory."""

    def flattened(x):
        return torch.ops.aten.sin.default(torch.ops.aten.view.default(x, [64 * batch, 8]))

    x = torch.randn(batch, 64, 8, dtype=torch.float64)
    gm = make_fx(flattened, tracing_mode="fake")(x)
    view, result = (n for n in gm.graph.nodes if n.op == "call_function")
    axis = TokenAxis(1, 1, 64, 1)
    info = TokenInfo(TokenAxis(0, batch, 64, 1), (axis,), sliceable=True, mixing=False, reason="")
    (place,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(view):
        rows = sliced_copy(gm.graph, view, info, {place: slice_value(gm.graph, place, axis, 16, 32)}, 16, 32)
        total = call(gm.graph, torch.ops.aten.sin.default, (rows,))
    result.replace_all_uses_with(total)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    held = max(lifetimes(gm, fused=False).live_bytes())
    assert held == measure_peak(gm, x) == batch * copied + batch * 16 * 8 * 8


def test_gradients_over_what_they_are_made_from_are_counted_once():
    """Their places live on; beside them is what the call takes for itself."""
    aten = torch.ops.aten

    def gradients(g, q, k, v, out, sums):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q * 1.0, k * 1.0, v * 1.0, out, sums, 0.0, True
        )

    shapes = [(1, 4, 64, 8)] * 5
    tensors = [torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2) for shape in shapes]
    gm = make_fx(gradients, tracing_mode="fake")(*tensors, torch.randn(1, 4, 64))
    write_over_attention_inputs(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.memo.attention_backward_onto.default)
    node.meta[WORKSPACE] = 1000
    step = list(gm.graph.nodes).index(node)
    assert lifetimes(gm, fused=True).live_bytes()[step] == 3 * tensors[0].nbytes + 1000
