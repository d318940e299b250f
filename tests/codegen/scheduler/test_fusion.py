"""What a graph has after a matmul waits for it, and makes no kernel with what the matmul reads."""

import contextlib

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.codegen.preview import dry_run
from memo_compile.codegen.scheduler.fusion import wait_for_matmuls
from memo_compile.runtime.ops import register

register()
ROWS, WIDTH = 4096, 64
ONE = ROWS * WIDTH * 4
MATMUL = WIDTH * WIDTH * 4
ATTENDED = 1024


def gated(gate, up, flows_in, weight):
    """The backward of a gated MLP: what its last layer reads is recomputed, and gradients flow on."""
    matmul = (torch.sigmoid(gate) * up).t() @ flows_in
    inner = flows_in @ weight
    return matmul, (inner * up * 2) @ weight, (inner * gate * 3) @ weight


def shared(x, flows_in, weight):
    """Both sides are made of one value, which a kernel for both need not keep."""
    activated = torch.sigmoid(x)
    matmul = (activated * 2).t() @ flows_in
    inner = flows_in @ weight
    return matmul, (inner * activated) @ weight


def through(x, weight):
    """What comes after the matmul reads it, too."""
    matmul = (x * 2) @ weight
    return (matmul, (x * matmul + 1) @ weight)


def two_attentions(first, second, values, index):
    """Both read which rows see which; the second's scores could be computed beside the first's."""
    sees = index.unsqueeze(1) >= index
    seen = torch.softmax(torch.where(sees, first @ first.t(), -1e9), 1) @ values
    return seen, torch.softmax(torch.where(sees, second @ second.t(), -1e9), 1) @ seen


def given(fn):
    torch.manual_seed(0)
    if fn is two_attentions:
        return [*(torch.randn(ATTENDED, WIDTH) for _ in range(3)), torch.arange(ATTENDED)]
    count = {gated: 3, shared: 2, through: 1}[fn]
    return [torch.randn(ROWS, WIDTH) for _ in range(count)] + [torch.randn(WIDTH, WIDTH)]


def guard(on):
    return inductor_config.patch("_pre_fusion_custom_pass", wait_for_matmuls) if on else contextlib.nullcontext()


def emitted(fn, *, guarded):
    gm = make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given(fn))
    with guard(guarded), inductor_config.patch(allow_buffer_reuse=False):
        return dry_run(gm, is_backward=False)


def buffers(body):
    return [s for s in body.storages.values() if s.kind == "allocated"]


def peak(body):
    """The most bytes of buffers that the emitted graph holds at once."""
    return max(sum(s.bytes for s in buffers(body) if s.start <= step < s.end) for step in range(body.steps))


def test_an_operand_is_gone_before_what_comes_after_its_matmul():
    before, after = (peak(emitted(gated, guarded=on)) for on in (False, True))
    assert after <= before - ONE + MATMUL


def test_two_layers_scores_are_not_held_at_once():
    before, after = (peak(emitted(two_attentions, guarded=on)) for on in (False, True))
    assert after <= before - (ATTENDED**2 - ATTENDED * WIDTH) * 4


def test_a_value_that_one_kernel_would_not_keep_is_not_put_in_memory():
    before, after = (len(buffers(emitted(shared, guarded=on))) for on in (False, True))
    assert after == before


@pytest.mark.parametrize("fn", [gated, shared, through, two_attentions])
def test_what_is_computed_stays_the_same(fn):
    tensors = given(fn)
    expected = fn(*tensors)
    with guard(True):
        found = torch.compile(fn)(*tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    torch._dynamo.reset()
