"""Scratch of kernels that allocate for themselves, by the formulas of their sources."""

import operator

import pytest
import torch

from bench.fuzzing.special import group as group_of_one
from memo_compile import measure_peak
from memo_compile.runtime.ops import register
from memo_compile.workspaces.formulas import by_formula

register()


def node_of(op, *shapes, dtype=torch.bfloat16):
    graph = torch.fx.Graph()
    arguments = []
    for number, shape in enumerate(shapes):
        argument = graph.placeholder(f"a{number}")
        value = torch.empty(shape, dtype=dtype, device="meta")
        if len(shape) == 4:  # token after token, as transposed heads lie
            value = torch.empty(shape[0], shape[2], shape[1], shape[3], dtype=dtype, device="meta").transpose(1, 2)
        argument.meta["val"] = value
        arguments.append(argument)
    return graph.call_function(op, tuple(arguments))


@pytest.mark.parametrize(
    ("heads_of_keys", "expected"),
    [(32, 4 * 32 * 8192 * (128 + 1)), (8, 4 * 32 * 8192 * (128 + 1) + 2 * 2 * 32 * 8192 * 128)],
    ids=["a key a head", "grouped queries"],
)
def test_flash_attentions_backward_sums_in_float32(heads_of_keys, expected):
    q, k = (1, 32, 8192, 128), (1, heads_of_keys, 8192, 128)
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    assert by_formula(node_of(op, q, q, k, k)) == expected


def test_rows_and_heads_are_padded():
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    shape = (2, 3, 130, 40)
    assert by_formula(node_of(op, shape, shape, shape, shape)) == 4 * 2 * 3 * 256 * (64 + 1)


@pytest.mark.parametrize(
    "op",
    [
        torch.ops.aten._scaled_dot_product_flash_attention_backward.default,
        torch.ops.aten._scaled_dot_product_efficient_attention_backward.default,
    ],
)
def test_a_gradient_that_lies_head_after_head_is_copied(op):
    shape = (1, 32, 8192, 128)
    node = node_of(op, shape, shape, shape, shape)
    before = by_formula(node)
    node.args[0].meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    assert by_formula(node) == before + 2 * 32 * 8192 * 128


@pytest.mark.parametrize(
    ("op", "dtype", "shape", "measured"),
    [
        ("cudnn", torch.bfloat16, (1, 32, 32768, 128), 541065728),
        ("cudnn", torch.bfloat16, (2, 8, 2048, 64), 8520192),
        ("cudnn", torch.bfloat16, (1, 4, 1000, 128), 2064384),
        ("flash", torch.bfloat16, (1, 32, 32768, 128), 541065216),
        ("flash", torch.bfloat16, (1, 4, 1000, 64), 1064960),
        ("efficient", torch.bfloat16, (1, 32, 32768, 128), 541196288),
        ("efficient", torch.bfloat16, (2, 8, 2048, 64), 8527872),
        ("efficient", torch.float32, (1, 32, 32768, 128), 545259520),
        ("efficient", torch.float32, (1, 4, 1000, 64), 1065984),
    ],
)
def test_scratch_is_what_was_measured_on_an_h200(op, dtype, shape, measured):
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{op}_attention_backward").default
    assert by_formula(node_of(backward, *[shape] * 4, dtype=dtype)) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_a_piece_at_a_time_has_what_it_is_measured_to_have(backward):
    register()
    rows, sums = (1, 8, 1024, 32), (1, 8, 1024)
    shapes = [rows] * 5 + [sums] if backward else [rows, sums, rows, rows]
    op = torch.ops.memo.attention_backward_onto if backward else torch.ops.memo.attention_onto
    tensors = [torch.randn(s[0], s[2], s[1], *s[3:]).transpose(1, 2) for s in shapes]
    node = node_of(op.default, *shapes, dtype=torch.float32)
    node.args = (*node.args, 0.0, True, 4)
    peak = measure_peak(lambda: op(*tensors, 0.0, True, 4))
    assert by_formula(node) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head_after_head", [False, True])
def test_attentions_backward_on_the_cpu_has_what_it_is_measured_to_have(dtype, head_after_head):
    shape = (1, 4, 2048, 32)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    query, key, value, gradient = (torch.randn(1, 2048, 4, 32, dtype=dtype).transpose(1, 2) for _ in range(4))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
    node = node_of(op, *[shape] * 5, dtype=dtype)
    if head_after_head:
        gradient = gradient.contiguous()
        node.args[0].meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    kept = []
    peak = measure_peak(lambda: kept.append(op(gradient, query, key, value, out, sums, 0.0, True)))
    assert by_formula(node) == pytest.approx(peak - sum(t.nbytes for t in kept[0]), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "heads", "rows", "columns", "head"), [(1, 4, 300, 700, 64), (2, 3, 1500, 1100, 40)])
def test_attention_in_low_precision_has_what_it_is_measured_to_have(dtype, batch, heads, rows, columns, head):
    """The processor lays keys and values out anew, or does not, and oneDNN takes scratch of its own."""
    q, g = (torch.randn(batch, rows, heads, head).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(batch, columns, heads, head).to(dtype).transpose(1, 2) for _ in range(2))
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    kept = []
    peak = measure_peak(lambda: kept.append(forward(q, k, v)))
    out, sums = kept.pop()
    assert by_formula(on_cpu(forward, q, k, v)) == peak - out.nbytes - sums.nbytes
    peak = measure_peak(lambda: kept.append(backward(g, q, k, v, out, sums, 0.0, False)))
    assert by_formula(on_cpu(backward, g, q, k, v, out, sums)) == peak - sum(t.nbytes for t in kept[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_low_precision_have_what_they_are_measured_to_have(dtype):
    a, b, out = (torch.randn(shape).to(dtype) for shape in ((300, 200), (200, 96), (300, 96)))
    peak = measure_peak(lambda: torch.mm(a, b, out=out))
    assert by_formula(on_cpu(torch.ops.aten.mm.default, a, b)) == peak
    assert by_formula(on_cpu(torch.ops.memo.mm_into_.default, out, a, b)) == peak
    batched, other = a.expand(3, -1, -1).contiguous(), b.expand(3, -1, -1).contiguous()
    peak = measure_peak(lambda: torch.bmm(batched, other)) - 3 * out.nbytes
    assert by_formula(on_cpu(torch.ops.aten.bmm.default, batched, other)) == peak


def test_nothing_is_called_for_another_machines_plan():
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    assert by_formula(on_cpu(torch.ops.aten.mm.default, a, b), measure=False) == 0


def on_cpu(op, *tensors):
    graph = torch.fx.Graph()
    arguments = [graph.placeholder(f"a{number}") for number in range(len(tensors))]
    for argument, tensor in zip(arguments, tensors, strict=True):
        argument.meta["val"] = tensor
    return graph.call_function(op, tuple(arguments))


def test_other_kernels_have_none():
    assert by_formula(node_of(torch.ops.aten.mm.default, (8, 8), (8, 8))) == 0


functional = torch.ops._c10d_functional
COLLECTIVES = {
    "a gather": (functional.all_gather_into_tensor, lambda x, group: (x, 1, group)),
    "gathers": (functional.all_gather_into_tensor_coalesced, lambda x, group: ([x, x], 1, group)),
    "a scatter": (functional.reduce_scatter_tensor, lambda x, group: (x, "sum", 1, group)),
    "scatters": (functional.reduce_scatter_tensor_coalesced, lambda x, group: ([x, x], "sum", 1, group)),
    "a sum": (functional.all_reduce, lambda x, group: (x, "sum", group)),
    "sums": (functional.all_reduce_coalesced, lambda x, group: ([x, x], "sum", group)),
    "an exchange": (functional.all_to_all_single, lambda x, group: (x, [64], [64], group)),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_what_gloo_copies_is_told_of_a_collectives_start_and_of_its_wait(name):
    op, arguments = COLLECTIVES[name]
    group, x = group_of_one(), torch.randn(64, 32)

    def call():
        results = op(*arguments(x, group))
        several = isinstance(results, list)
        return [functional.wait_tensor(r) for r in results] if several else functional.wait_tensor(results)

    call()
    results = call()
    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    given.meta["val"] = torch.empty_like(x, device="cpu")
    started = graph.call_function(op.default, arguments(given, group))
    started.meta["val"] = results
    first = graph.call_function(operator.getitem, (started, 0)) if isinstance(results, list) else started
    first.meta["val"] = results[0] if isinstance(results, list) else results
    wait = graph.call_function(functional.wait_tensor.default, (first,))
    made = sum(r.nbytes for r in (results if isinstance(results, list) else [results]))
    del results
    started.meta["val"] = [torch.empty_like(x)] * 2 if first is not started else torch.empty_like(x)
    assert by_formula(started) == by_formula(wait) == measure_peak(call) - made


def test_a_wait_for_what_is_given_takes_nothing_that_is_known():
    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    given.meta["val"] = torch.empty(4)
    assert by_formula(graph.call_function(functional.wait_tensor.default, (given,))) is None
