"""A mask that several attentions read is in memory once."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.codegen.lowerings import register_lowerings
from memo_compile.codegen.preview import dry_run
from memo_compile.passes.transforms.masks import share_masks
from memo_compile.runtime.ops import register

register()
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
KEEP = torch.ops.memo.keep.default
ROWS = 128
MASK_BYTES = ROWS * ROWS * 4


def attend(x, mask):
    return KERNEL(x, x * 2, x * 3, 0.0, False, attn_mask=mask)[0]


def mask_of(allowed):
    return torch.where(allowed, 0.0, float("-inf"))


def layers(x, allowed):
    mask = mask_of(allowed)
    return (attend(attend(attend(x, mask), mask), mask),)


def views(x, allowed):
    mask = mask_of(allowed[0])[None]
    return (attend(attend(x, mask), mask),)


def alone(x, allowed):
    return (attend(x, mask_of(allowed)),)


def returned(x, allowed):
    mask = mask_of(allowed)
    return attend(attend(x, mask), mask), mask


def handed(x, mask):
    return (attend(attend(x, mask), mask),)


def given():
    torch.manual_seed(0)
    return torch.randn(1, 4, ROWS, 8), torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool).tril()


def traced(fn, tensors):
    return make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)


def kept(gm):
    return gm.graph.find_nodes(op="call_function", target=KEEP)


def masks_in_memory(gm):
    body = dry_run(gm, is_backward=False)
    return [s for s in body.storages.values() if s.kind == "allocated" and s.bytes == MASK_BYTES]


def test_all_attentions_read_the_same_buffer():
    gm = share_masks(traced(layers, given()))
    (one,) = kept(gm)
    assert [u.kwargs["attn_mask"] for u in one.users] == [one] * 3
    assert len(masks_in_memory(gm)) == 1


def test_without_the_pass_each_has_its_own():
    """The reason for the pass. When this fails, torch no longer copies masks, and the pass is needed no more."""
    assert len(masks_in_memory(traced(layers, given()))) == 3


@pytest.mark.parametrize("fn", [layers, views])
def test_what_is_computed_stays_the_same(fn):
    register_lowerings()
    tensors = given()
    gm = share_masks(traced(fn, tensors))
    (expected,) = fn(*tensors)
    assert torch.equal(gm(*tensors)[0], expected)
    assert torch.equal(torch._inductor.compile(gm, list(tensors))(*tensors)[0], expected)


def test_a_mask_that_is_read_through_views_is_shared():
    gm = share_masks(traced(views, given()))
    assert len(kept(gm)) == 1
    assert len(masks_in_memory(gm)) == 1


@pytest.mark.parametrize("fn", [alone, returned])
def test_masks_with_one_reader_or_in_memory_anyway_are_left_alone(fn):
    assert not kept(share_masks(traced(fn, given())))


def test_a_mask_that_is_handed_in_is_left_alone():
    x, allowed = given()
    assert not kept(share_masks(traced(handed, (x, mask_of(allowed)))))
