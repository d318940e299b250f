"""The verifier reads emitted code, and rejects what would overwrite a value that is still needed."""

import pytest
import torch
import zoo

from memo_compile.codegen import compiler, rehearsal
from memo_compile.codegen.emitted.verifier import read_regions, verify_emitted
from memo_compile.errors import PlacementOverlap

FORWARD = """
memo_arena_0 = empty_strided_cpu((128, ), (1, ), torch.uint8)
buf0 = alloc_from_pool(memo_arena_0, 0, torch.float32, (16, ), (1, ))
cpp_f(primals_1, buf0)
buf1 = alloc_from_pool(memo_arena_0, {offset}, torch.float32, (16, ), (1, ))
cpp_f(buf0, buf1)
del buf0
"""
BACKWARD = """
memo_arena_1 = empty_strided_cpu((64, ), (1, ), torch.uint8)
buf2 = alloc_from_pool(memo_arena_1, 0, torch.float32, (16, ), (1, ))
cpp_f(buf1, buf2)
"""


def forward(offset=64):
    return read_regions(FORWARD.format(offset=offset).splitlines(), ["buf1"], ["primals_1"])


def test_regions_that_share_no_bytes_pass():
    verify_emitted(forward(), read_regions(BACKWARD.splitlines(), ["grad"], ["buf1", "grad"]), [(0, "buf1")])


@pytest.mark.parametrize("returned", ["buf1", "buf2", "buf3"])
def test_a_gradient_in_the_arena_is_rejected(returned):
    """Also one that is written over what the forward has saved."""
    text = BACKWARD + "buf3 = buf1; del buf1  # reuse\ncpp_f(buf2, buf3)"
    with pytest.raises(PlacementOverlap, match="returned to the user"):
        verify_emitted(forward(), read_regions(text.splitlines(), [returned], ["buf1"]), [(0, "buf1")])


def test_an_output_in_the_arena_is_rejected():
    with pytest.raises(PlacementOverlap, match="returned to the user"):
        verify_emitted(forward(), read_regions(BACKWARD.splitlines(), [], ["saved"]), [])


@pytest.mark.parametrize("offset", [0, 32, 63])
def test_an_overlap_is_rejected(offset):
    with pytest.raises(PlacementOverlap, match=r"buf1.*buf0"):
        verify_emitted(forward(offset))


@pytest.mark.parametrize("start", [0, 8, 15])
def test_an_overlap_in_a_segment_of_a_dtype_is_rejected(start):
    """Such views start at an element."""
    text = FORWARD.format(offset=0).replace("(128, ), (1, ), torch.uint8", "(32, ), (1, ), torch.float32")
    text = text.replace("alloc_from_pool(memo_arena_0, 0, torch.float32, (16, ), (1, ))", "{}")

    def read(first, second):
        views = (f"reinterpret_tensor(memo_arena_0, (16, ), (1, ), {at})" for at in (first, second))
        return read_regions(text.format(*views).splitlines(), ["buf1"], ["primals_1"])

    verify_emitted(read(0, 16))
    with pytest.raises(PlacementOverlap, match=r"buf1.*buf0"):
        verify_emitted(read(0, start))
    with pytest.raises(PlacementOverlap, match="has 128"):
        verify_emitted(read(0, 16 + start + 1))


def test_a_region_beyond_its_segment_is_rejected():
    with pytest.raises(PlacementOverlap, match="has 128"):
        verify_emitted(forward(96))


def test_an_alias_keeps_its_region_alive():
    text = FORWARD.format(offset=0).replace("cpp_f(buf0, buf1)", "buf3 = reinterpret_tensor(buf0, (4, 4), (4, 1), 0)")
    with pytest.raises(PlacementOverlap):
        verify_emitted(read_regions((text + "\ncpp_f(buf3)").splitlines(), ["buf1"], ["primals_1"]))


@pytest.mark.parametrize(
    "view", ["torch.ops.aten.view_as_complex.default(buf0)", "torch.ops.aten.split.Tensor(split_size=8, self=buf0)"]
)
def test_a_view_that_a_kernels_call_makes_keeps_its_region_alive(view):
    text = FORWARD.format(offset=0).replace("cpp_f(buf0, buf1)", f"buf3 = {view}\nbuf4 = buf3")
    with pytest.raises(PlacementOverlap):
        verify_emitted(read_regions((text + "\ncpp_f(buf4)").splitlines(), ["buf1"], ["primals_1"]))


def test_a_result_of_its_own_does_not():
    sort = "buf3 = torch.ops.aten.sort.default(buf0)"
    text = FORWARD.format(offset=0).replace("\ndel buf0", "").replace("(buf0, buf1)", "(buf1)")
    text = text.replace("buf1 = alloc", f"{sort}\ndel buf0\nbuf1 = alloc")
    verify_emitted(read_regions((text + "\ncpp_f(buf3)").splitlines(), ["buf1"], ["primals_1"]))


@pytest.mark.parametrize("until", ["del buf0", "pass"])
def test_bytes_are_an_owners_until_its_name_is_deleted(until):
    text = FORWARD.format(offset=0).replace("cpp_f(buf0, buf1)", "cpp_f(primals_1, buf1)")
    with pytest.raises(PlacementOverlap, match="buf0 still lies"):
        verify_emitted(read_regions(text.replace("del buf0", until).splitlines(), ["buf1"], ["primals_1"]))


@pytest.mark.parametrize("line", ["torch.ops.mine.op(buf0)", "region_args = [buf0]", "with s1:\n    copy(buf0)"])
def test_what_a_line_is_given_that_memo_does_not_know_is_rejected_in_the_arena(line):
    text = FORWARD.format(offset=64).replace("cpp_f(buf0, buf1)", line)
    with pytest.raises(PlacementOverlap, match="given to what may keep it"):
        verify_emitted(read_regions(text.splitlines(), ["primals_1"], ["primals_1"]))


def test_so_is_what_the_forward_has_handed_on():
    text = BACKWARD + "torch.ops.mine.op.default(buf1)"
    with pytest.raises(PlacementOverlap, match="given to what may keep it"):
        verify_emitted(forward(), read_regions(text.splitlines(), ["grad"], ["buf1", "grad"]), [(0, "buf1")])


def test_bytes_may_be_used_again_once_their_owner_is_dead():
    lines = FORWARD.format(offset=0).replace("cpp_f(buf0, buf1)", "cpp_f(primals_1, buf1)").splitlines()
    text = "\n".join([*lines[:4], "del buf0", *lines[4:-1]])
    verify_emitted(read_regions(text.splitlines(), ["buf1"], ["primals_1"]))


def test_a_sabotaged_plan_does_not_compile(monkeypatch):
    """Every offset of the layout set to 0: the emitted code itself gives it away."""
    from dataclasses import replace

    whole = compiler.plan_arena

    def sabotaged(*args, **kwargs):
        layout = whole(*args, **kwargs)
        return replace(layout, buffers=tuple(replace(b, offset=0) for b in layout.buffers))

    monkeypatch.setattr(rehearsal, "plan_arena", sabotaged)
    model, x = zoo.make("llama"), zoo.batch(1)
    with pytest.raises(Exception, match=r"while .* still lies"):
        zoo.gradients(model, torch.compile(model, backend="memo"), x)
