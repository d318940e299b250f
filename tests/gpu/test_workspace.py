"""What fused attention allocates for itself on a GPU, against the formulas of its sources."""

import pytest
import torch

import memo_compile
from memo_compile.workspaces.formulas import by_formula

ATEN = torch.ops.aten
FLASH = (ATEN._scaled_dot_product_flash_attention.default, ATEN._scaled_dot_product_flash_attention_backward.default)
EFFICIENT = (
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_efficient_attention_backward.default,
)
CUDNN = (ATEN._scaled_dot_product_cudnn_attention.default, ATEN._scaled_dot_product_cudnn_attention_backward.default)
ROWS = 2048


def node_of(op, args):
    """A call of the op on placeholders that stand for the tensors among its arguments."""
    graph = torch.fx.Graph()
    nodes = []
    for number, value in enumerate(args):
        node = value
        if isinstance(value, torch.Tensor):
            node = graph.placeholder(f"a{number}")
            node.meta["val"] = value
        nodes.append(node)
    return graph.call_function(op, tuple(nodes))


def calls(kernel, q, k, v, gradient):
    """The forward's and the backward's op with their arguments."""
    if kernel is FLASH:
        forward = (q, k, v, 0.0, True)
        out, sums, cum_q, cum_k, max_q, max_k, seed, offset, _ = FLASH[0](*forward)
        backward = (gradient, q, k, v, out, sums, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset)
    elif kernel is CUDNN:
        forward = (q, k, v, None, True, 0.0, True)
        out, sums, cum_q, cum_k, max_q, max_k, seed, offset, _ = CUDNN[0](*forward)
        backward = (gradient, q, k, v, out, sums, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True)
    else:
        forward = (q, k, v, None, True, 0.0, True)
        out, sums, seed, offset = EFFICIENT[0](*forward)
        backward = (gradient, q, k, v, None, out, sums, seed, offset, 0.0, [True, True, True, False], True)
    return forward, backward


CASES = [
    (CUDNN, torch.bfloat16, 64),
    (CUDNN, torch.bfloat16, 128),
    (FLASH, torch.bfloat16, 64),
    (FLASH, torch.bfloat16, 128),
    (EFFICIENT, torch.float32, 32),
    (EFFICIENT, torch.float32, 64),
    (EFFICIENT, torch.float32, 128),
    (EFFICIENT, torch.bfloat16, 32),
    (EFFICIENT, torch.bfloat16, 64),
    (EFFICIENT, torch.bfloat16, 128),
]


def scratch(op, arguments):
    """Bytes that a call allocates beyond its outputs, what is counted for it, and its outputs' bytes."""
    outputs = [t for t in op(*arguments) if isinstance(t, torch.Tensor) and t.is_cuda]
    held = sum(t.numel() * t.element_size() for t in outputs)
    del outputs
    return memo_compile.measure_peak(op, *arguments) - held, by_formula(node_of(op, arguments)), held


def inputs(batch, heads, rows, head, dtype):
    """Queries, keys, values and the output's gradient, all token after token."""
    shape = (batch, rows, heads, head)
    return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4)]


@pytest.mark.parametrize(("kernel", "dtype", "head"), CASES)
@pytest.mark.parametrize("token_by_token", [True, False])
def test_scratch_is_as_counted(kernel, dtype, head, token_by_token):
    q, k, v, gradient = inputs(2, 8, ROWS, head, dtype)
    if not token_by_token:
        gradient = gradient.contiguous()
    for op, arguments in zip(kernel, calls(kernel, q, k, v, gradient), strict=True):
        measured, counted, held = scratch(op, arguments)
        assert abs(measured - counted) <= 0.02 * held + 16384, (measured, counted, held)
