"""Prefetch buffers in emitted text: what may be on its way before its backward begins."""

from memo_compile.codegen.emitted.prefetch_buffers import schedule_of, take_prefetch_buffer


def landing(number, offset):
    """The lines by which a slice of eight numbers lands in a segment of its own."""
    return [
        take_prefetch_buffer(f"memo_arena_{number}", 64, "lease", offset, "empty_strided_cpu"),
        f"buf{number} = alloc_from_pool(memo_arena_{number}, 0, torch.float64, (8, ), (1, ))",
        f"torch.ops.memo.prefetch_.default(buf{number}, lease, {offset})",
        f"torch.ops.memo.wait_.default(buf{number}, lease, {offset})",
    ]


def test_each_slice_may_be_early():
    schedule = schedule_of([*landing(0, 0), *landing(1, 64)])
    assert [(e.buffer, e.offset, e.nbytes) for e in schedule.early] == [("buf0", 0, 64), ("buf1", 64, 64)]
    assert schedule.count == 2


def test_of_a_slice_that_comes_twice_the_first_may_be_early_and_both_count():
    schedule = schedule_of([*landing(0, 0), *landing(1, 64), *landing(2, 0)])
    assert [e.buffer for e in schedule.early] == ["buf0", "buf1"]
    assert schedule.count == 3


def test_where_the_first_lies_beside_others_the_second_is_not_early():
    lines = landing(1, 0)
    shared = [
        "memo_arena_0 = empty_strided_cpu((128, ), (1, ), torch.uint8)",
        "buf0 = alloc_from_pool(memo_arena_0, 0, torch.float64, (8, ), (1, ))",
        "torch.ops.memo.prefetch_.default(buf0, lease, 0)",
    ]
    assert schedule_of([*shared, *lines]).early == ()
