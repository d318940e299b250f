"""A placed buffer is a view of its segment: cheap where it has the segment's dtype, read back as it was written."""

import ast

import pytest
import torch
from torch._C._dynamo.guards import _empty_strided_cpu, _reinterpret_tensor

from memo_compile.codegen.emitted.views import Segment, View, common_dtype, read_view
from memo_compile.codegen.wrapper import rewrite
from memo_compile.schema import ArenaBuffer, ArenaSegment, Side

EMITTED = {
    "empty_strided_cpu": _empty_strided_cpu,
    "reinterpret_tensor": _reinterpret_tensor,
    "alloc_from_pool": torch.ops.inductor._alloc_from_pool,
    "torch": torch,
}
SEGMENT = Segment("memo_arena_0", 256, "torch.float32")


def expression(text):
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.int64", "torch.bool"])
@pytest.mark.parametrize("offset", [0, 64, 128])
def test_a_view_is_read_as_it_was_written_and_lies_there(dtype, offset):
    text = SEGMENT.view(offset, dtype, "(4, 2)", "(2, 1)")
    assert text.startswith("reinterpret_tensor(" if dtype == SEGMENT.dtype else "alloc_from_pool(")
    assert read_view(expression(text), {SEGMENT.name: SEGMENT.dtype}) == View(
        SEGMENT.name, offset, dtype, (4, 2), (2, 1)
    )
    names = dict(EMITTED)
    exec(SEGMENT.taken("empty_strided_cpu"), names)
    view = eval(text, names)
    segment = names[SEGMENT.name]
    assert segment.untyped_storage().nbytes() == 256
    assert view.untyped_storage().data_ptr() == segment.data_ptr() == view.data_ptr() - offset
    assert (view.shape, view.stride(), str(view.dtype)) == ((4, 2), (2, 1), dtype)


def test_a_view_of_a_buffer_is_none_of_a_segment():
    assert read_view(expression("reinterpret_tensor(buf0, (4, ), (1, ), 2)"), {"memo_arena_0": "torch.int8"}) is None
    assert read_view(expression("buf0"), {}) is None


def test_bytes_that_no_dtype_divides_stay_bytes():
    assert common_dtype(6, ["torch.float32"]) == "torch.uint8"
    assert Segment("memo_arena_0", 6).taken("empty_strided_cpu").endswith("((6, ), (1, ), torch.uint8)")
    assert Segment("memo_arena_0", 8, "torch.float32").view(2, "torch.float32", "(1, )", "(1, )") == (
        "alloc_from_pool(memo_arena_0, 2, torch.float32, (1, ), (1, ))"
    )


def test_a_segment_is_of_the_dtype_that_most_of_its_buffers_have():
    lines = [
        "    buf0 = empty_strided_cpu((4, ), (1, ), torch.int64)",
        "    buf1 = empty_strided_cpu((8, 2), (2, 1), torch.bfloat16)",
        "    buf2 = empty_strided_cpu((16, ), (1, ), torch.bfloat16)",
    ]
    buffers = [ArenaBuffer(Side.FORWARD, f"buf{i}", "memo_arena_0", 64 * i, 32, i, 3) for i in range(3)]
    assert rewrite(lines, buffers, [ArenaSegment("memo_arena_0", 192, 0, 3)]) == [
        "    memo_arena_0 = empty_strided_cpu((96, ), (1, ), torch.bfloat16)",
        "    buf0 = alloc_from_pool(memo_arena_0, 0, torch.int64, (4, ), (1, ))",
        "    buf1 = reinterpret_tensor(memo_arena_0, (8, 2), (2, 1), 32)",
        "    buf2 = reinterpret_tensor(memo_arena_0, (16, ), (1, ), 64)",
        "    del memo_arena_0",
    ]
