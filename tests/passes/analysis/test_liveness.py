"""What a fusing compiler keeps out of memory."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.analysis.liveness import reaches_memory


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
