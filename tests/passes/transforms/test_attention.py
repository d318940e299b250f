"""What a fused attention makes replaces what it reads last, and is the kernel's own bit by bit."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.codegen.lowerings import register_lowerings
from memo_compile.passes.fx.facts import storage_of
from memo_compile.passes.fx.heads import heads_of_piece
from memo_compile.passes.transforms.attention import PIECES, are_apart, may_be_overwritten, write_over_attention_inputs
from memo_compile.runtime.ops import register

register()
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ONTO = torch.ops.memo.attention_onto.default
BACKWARD_ONTO = torch.ops.memo.attention_backward_onto.default


def rows_of(heads, *, batch=2, rows=40, head=8):
    return torch.randn(batch, rows, heads, head, dtype=torch.float64).transpose(1, 2)


def given(heads, mask=None):
    torch.manual_seed(0)
    g, q, k, v = (rows_of(heads) for _ in range(4))
    out, sums = KERNEL(q, k, v, 0.0, mask is None, attn_mask=mask)
    return g, q, k, v, out, sums


def step(g, q, k, v, out, sums):
    """A backward that makes its queries, keys and values, and reads them nowhere else."""
    return masked(g, q, k, v, out, sums, None)


def masked(g, q, k, v, out, sums, mask):
    q, k, v = q * 1.0, k * 1.0, v * 1.0
    dq, dk, dv = BACKWARD(g, q, k, v, out, sums, 0.0, mask is None, attn_mask=mask)
    return dq + 1, dk.permute(0, 2, 1, 3).reshape(-1), dv * 2


def front(q, k, v):
    out, sums = KERNEL(q * 1.0, k, v, 0.0, True)
    return out, sums


def traced(fn, tensors):
    return make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)


def rewritten(gm, target=BACKWARD_ONTO):
    return list(write_over_attention_inputs(gm).graph.find_nodes(op="call_function", target=target))


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 7])
def test_gradients_are_those_of_the_kernel(heads):
    tensors = given(heads)
    gm = traced(step, tensors)
    expected = gm(*tensors)
    pieces = [n.args[8] for n in rewritten(gm)]
    assert pieces == ([] if heads == 1 else [min(heads, PIECES)])
    assert same(gm(*tensors), expected)


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_an_output_over_its_queries_is_the_kernels(heads):
    _, *tensors, _, _ = given(heads)
    gm = traced(front, tensors)
    expected = gm(*tensors)
    assert len(rewritten(gm, ONTO)) == (heads > 1)
    assert same(gm(*tensors), expected)


def test_storages_of_results_are_those_of_what_they_replace():
    gm = traced(step, given(4))
    (node,) = rewritten(gm)
    for item in node.users:
        assert storage_of(item) is storage_of(node.args[item.args[1]])


def test_the_callers_values_are_not_written_over():
    gm = traced(lambda *args: BACKWARD(*args, 0.0, True), given(4))
    assert not rewritten(gm)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_read_later_is_not_written_over(which):
    def reads_later(g, q, k, v, out, sums):
        inputs = [q * 1.0, k * 1.0, v * 1.0]
        later = inputs[which].transpose(1, 2)
        made = BACKWARD(g, *inputs, out, sums, 0.0, True)
        return *made, later + 1

    tensors = given(4)
    gm = traced(reads_later, tensors)
    expected = gm(*tensors)
    assert not rewritten(gm)
    assert same(gm(*tensors), expected)


def test_one_value_for_two_is_not_written_over():
    def self_attention(g, q, k, v, out, sums):
        q = q * 1.0
        return BACKWARD(g, q, q, q, out, sums, 0.0, True)

    assert not rewritten(traced(self_attention, given(4)))


@pytest.mark.parametrize(("mask", "can"), [((40, 40), True), ((2, 1, 40, 40), True), ((2, 4, 40, 40), False)])
def test_a_mask_that_heads_share_goes_to_every_piece(mask, can):
    torch.manual_seed(1)
    mask = torch.randn(mask, dtype=torch.float64)
    tensors = given(4, mask)
    gm = traced(masked, (*tensors, mask))
    expected = gm(*tensors, mask)
    assert bool(rewritten(gm)) is can
    assert same(gm(*tensors, mask), expected)


def test_neighbours_in_one_storage_are_apart():
    whole = torch.empty(2, 10, 3 * 4 * 8)
    q, k, v = (t.view(2, 10, 4, 8).transpose(1, 2) for t in whole.split(32, -1))
    nodes = nodes_of(q, k, v)
    assert are_apart(nodes, [])
    assert not are_apart([nodes[0]], nodes_of(q, root=nodes[0].args[0]))


def test_heads_that_are_one_are_not_apart():
    (expanded,) = nodes_of(torch.empty(2, 1, 10, 8).expand(2, 4, 10, 8))
    assert not are_apart([expanded], [])


def nodes_of(*values, root=None):
    """Views of one storage."""
    graph = root.graph if root is not None else torch.fx.Graph()
    base = root if root is not None else graph.call_function(torch.ops.aten.empty.memory_format, ([1],))
    nodes = [graph.call_function(torch.ops.aten.alias.default, (base,)) for _ in values]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    return nodes


def test_no_thread_is_left_without_a_head(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert heads_of_piece(1, 8, 4) == 6
    assert heads_of_piece(4, 8, 4) == 2
    assert heads_of_piece(1, 2, 4) == 2


def compiled(fn, tensors, target=BACKWARD_ONTO):
    """What Inductor makes of `fn`, rewritten first as memo rewrites it."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    register_lowerings()
    gm = traced(fn, tensors)
    assert rewritten(gm, target)
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    with config.patch(force_disable_caches=True):  # its keys know nothing of lowerings
        return compile_fx_inner(gm, values)


def test_inductor_writes_the_gradients_in_place():
    tensors = given(4)
    expected = step(*tensors)
    assert same(compiled(step, tensors)(list(tensors)), expected)


def test_copies_of_the_callers_values_leave_these_as_they_were():
    """Whether Inductor makes the copies or not."""

    def copies(g, q, k, v, out, sums):
        inputs = [q.clone(), k.clone(), v.clone()]
        made = BACKWARD(g, *inputs, out, sums, 0.0, True)
        return *made, q + k + v

    tensors = given(4)
    kept = [t.clone() for t in tensors]
    expected = copies(*tensors)
    assert same(compiled(copies, tensors)(list(tensors)), expected)
    assert same(tensors, kept)


def test_an_op_that_inductor_lowers_to_nothing_is_not_taken_for_a_copy():
    def casts(g, q, k, v, out, sums):
        q, k, v = q.sin(), k.sin(), v.sin()
        inputs = [torch.ops.prims.convert_element_type.default(t, torch.float64) for t in (q, k, v)]
        made = BACKWARD(g, *inputs, out, sums, 0.0, True)
        return *made, q * k * v

    g, q, k, v, out, sums = given(4)
    tensors = (g, q, k, v, out, sums)
    expected = casts(*tensors)
    found = compiled(casts, tensors)(list(tensors))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


def test_what_is_computed_from_an_operand_later_is_computed_from_the_operand():
    """Inductor computes an elementwise value where that is read, which may be after the attention."""

    def early(g, q, k, v, out, sums, eye):
        q, k, v = q @ eye, k @ eye, v @ eye
        values = q.sin(), k.cos(), v.tanh()
        made = BACKWARD(g, q, k, v, out, sums, 0.0, True)
        return [a * b for a, b in zip(made, values, strict=True)]

    tensors = (*given(4), torch.eye(8, dtype=torch.float64))
    expected = early(*tensors)
    found = compiled(early, tensors)(list(tensors))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


def test_what_is_computed_from_the_queries_later_is_not_computed_from_the_output():
    def early(q, k, v, eye):
        q = q @ eye
        value = q.sin()
        return (KERNEL(q, k, v, 0.0, True)[0] + value,)

    _, *qkv, _, _ = given(4)
    tensors = (*qkv, torch.eye(8, dtype=torch.float64))
    (expected,) = early(*tensors)
    (found,) = compiled(early, tensors, ONTO)(list(tensors))
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_value_may_be_overwritten_where_it_is_read_last():
    gm = traced(step, given(4))
    (node,) = gm.graph.find_nodes(op="call_function", target=BACKWARD)
    assert [may_be_overwritten(node, a) for a in node.args[:6]] == [False, True, True, True, False, False]
