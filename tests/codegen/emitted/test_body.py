"""The body that Inductor emits, read as storages and live ranges."""

import pytest

from memo_compile.codegen.emitted.body import Inside, dense_bytes, read_body
from memo_compile.placement.bounds import live_bytes

BODY = """
buf0 = empty_strided_cpu((4, 8), (8, 1), torch.float32)
cpp_fused_0(primals_1, buf0)
buf1 = empty_strided_cpu((4, 8), (8, 1), torch.float64)
extern_kernels.mm(buf0, primals_2, out=buf1)
buf2 = reinterpret_tensor(buf0, (8, 4), (4, 1), 0); del buf0  # reuse
cpp_fused_1(buf2, buf1)
del buf2
buf3 = torch.ops.aten.kernel(buf1)
buf4 = buf3[0]
del buf3
"""


def read(source: str = BODY, outputs: tuple[str, ...] = ("reinterpret_tensor(buf1, (8, 4), (4, 1), 0)", "primals_1")):
    sizes = {"buf3": ("workspace", 8), "buf4": ("kernel", 40)}
    return read_body(source, outputs, ["primals_1", "primals_2"], sizes.get)


def test_an_allocation_is_live_from_its_line_to_its_last_reader():
    body = read()
    assert (body.storages["buf0"].start, body.storages["buf0"].end) == (0, 8)
    assert body.storages["buf0"].bytes == 4 * 8 * 4


def test_it_lives_until_its_name_is_deleted_though_nothing_names_it():
    """Inductor deletes what a collective reads after the wait for it, which names only the result."""
    text = BODY.replace("buf2 = reinterpret_tensor(buf0, (8, 4), (4, 1), 0); del buf0  # reuse", "wait(buf1)\ndel buf0")
    assert read(text).storages["buf0"].end == 6
    assert read(text.replace("del buf0", "pass")).storages["buf0"].end == read(text).steps


@pytest.mark.parametrize(
    "line",
    [
        "buf9 = torch.ops.mine.op.default(buf0)",
        "some_function(buf0)",
        "region_args = [buf0, buf1]",
        "buf9[0] = buf0",
        "if flag:\n    cpp_fused_3(buf0)",
        "while flag:\n    cpp_fused_3(buf0)",
        "with stream1:\n    cpp_fused_3(buf0)",
        "cpp_fused_3(lent(buf0))",
    ],
)
def test_what_a_line_touches_that_memo_does_not_know_stays_with_torchs_allocator(line):
    text = BODY.replace("cpp_fused_1(buf2, buf1)", f"{line}\ncpp_fused_1(buf2, buf1)").replace("; del buf0", "")
    body = read(text)
    assert "buf0" in body.held
    assert body.storages["buf0"].kind == "held"
    assert body.storages["buf1"].kind == ("held" if "buf1" in line else "allocated")


@pytest.mark.parametrize(
    "line",
    [
        "assert_size_stride(buf0, (4, 8), (8, 1))",
        "aten.index_put_(buf0, [buf1], primals_1, True)",
        "triton_poi_fused_add_0.run(buf0, buf1, 32, stream=stream0)",
        "torch.ops._c10d_functional.wait_tensor.default(reinterpret_tensor(buf0, (8, 4), (4, 1), 0))",
        "u0 = buf0.item()",
        "with torch.cuda._DeviceGuard(0):\n    cpp_fused_3(buf0)",
    ],
)
def test_lines_that_are_known_keep_nothing(line):
    assert not read(BODY.replace("cpp_fused_1(buf2, buf1)", line.replace("buf0", "buf2"))).held


def test_an_input_that_is_given_away_is_told():
    assert read(BODY + "buf9 = torch.ops.mine.op.default(primals_2)\n").held == ("primals_2",)


def test_what_inductor_knows_to_be_held_is_held():
    def no_kernel(_):
        return None

    body = read_body(BODY, ["primals_1"], ["primals_1", "primals_2"], no_kernel, held=["buf2", "primals_1", "other"])
    assert body.held == ("buf0", "primals_1")


def test_reuse_keeps_the_storage_of_the_first_name():
    assert "buf2" not in read().storages


def test_what_is_returned_lives_to_the_end():
    body = read()
    assert body.outputs == ("buf1", "primals_1")
    assert body.storages["buf1"].end == body.steps


def test_a_kernel_that_allocates_its_own_output_is_counted():
    storage = read().storages["buf4"]
    assert (storage.kind, storage.bytes) == ("kernel", 40)


def test_the_only_result_of_a_kernel_is_counted():
    """Inductor emits `buf4 = buf3` where a kernel returns one tensor and no tuple."""
    storage = read(BODY.replace("buf3[0]", "buf3")).storages["buf4"]
    assert (storage.kind, storage.bytes) == ("kernel", 40)


def test_results_live_as_long_as_the_tuple_that_holds_them():
    text = BODY.replace("del buf3", "del buf4\ncpp_fused_2(primals_1)\nbuf5 = buf3[1]\ndel buf5\ndel buf3")
    sizes = {"buf3": ("workspace", 8), "buf4": ("kernel", 40), "buf5": ("kernel", 16)}
    storages = read_body(text, ["primals_1"], ["primals_1", "primals_2"], sizes.get).storages
    assert storages["buf4"].end == storages["buf5"].end


SUBGRAPH = """
buf0 = empty_strided_cpu((4, 8), (8, 1), torch.float32)
region_args = [buf0, primals_1]
del buf0
buf1 = region(region_args)
buf2 = buf1[0]
del buf1
"""


def held_by_step(body):
    return live_bytes([(s.start, s.end, s.bytes) for s in body.storages.values()], body.steps)


def test_a_subgraph_lets_go_of_what_it_is_given_alone():
    """Of the two, 1,000 bytes are allocated after that."""
    sizes = {"buf1": ("workspace", 0), "buf2": ("kernel", 40)}
    inside = {"region": Inside(own=(500, 1000), ends=(1, 2), results=40)}
    body = read_body(SUBGRAPH, ["buf2"], ["primals_1"], sizes.get, inside=inside)
    assert held_by_step(body)[3] == 40 + 960
    later = Inside(own=(500, 1000), ends=(2, 2), results=40)
    assert held_by_step(read_body(SUBGRAPH, ["buf2"], ["primals_1"], sizes.get, inside={"region": later}))[3] == 1128


def test_what_is_needed_after_a_subgraph_is_not_its_own():
    text = SUBGRAPH.replace("del buf0\n", "") + "cpp_fused_0(buf0, buf2)\n"
    inside = {"region": Inside(own=(500, 1000), ends=(1, 2), results=0)}
    body = read_body(text, ["buf2"], ["primals_1"], {"buf1": ("workspace", 0)}.get, inside=inside)
    assert held_by_step(body)[2] == 128 + 1000


def test_the_text_of_a_subgraph_tells_what_its_graph_does_not():
    def told(names, label):
        return 400

    inside = {"region": Inside(own=(300,), ends=(1, 1), results=0)}
    body = read_body(SUBGRAPH, ["buf2"], [], lambda name: None, taken_by=told, inside=inside)
    assert body.storages["region:3"].bytes == 300 + 128


def test_what_lies_on_another_device_has_no_place():
    text = BODY.replace("buf1 = empty_strided_cpu", "buf1 = empty_strided_cuda")
    storages = read(text).storages
    assert (storages["buf1"].kind, storages["buf0"].kind) == ("allocated", "kernel")
    assert storages["buf0"].bytes == 0


def test_devices_of_one_kind_are_told_apart_by_the_guards_around():
    block = "with torch.cuda._DeviceGuard({0}):\n    buf{0} = empty_strided_cuda(({1}, ), (1, ), torch.float32)\n"
    text = block.format(0, 64) + block.format(1, 128)
    for device, place in ((None, "buf1"), ("cuda:0", "buf0"), ("cuda:1", "buf1"), ("cpu", None)):
        storages = read_body(text, [], [], lambda _: None, device=device).storages
        assert [n for n, s in storages.items() if s.kind == "allocated"] == ([place] if place else [])
        assert all(s.bytes == 0 for n, s in storages.items() if n != place)


def test_a_view_that_a_kernels_call_makes_lies_in_what_it_is_of():
    text = BODY.replace("kernel(buf1)", "view_as_complex.default(buf1)").replace("buf3[0]", "buf3") + "cpp_k(buf4)\n"
    views = {"buf3": ("buf1",), "buf4": ("buf3",)}
    body = read_body(text, ["buf4"], ["primals_1", "primals_2"], lambda _: None, lambda name: views.get(name, ()))
    assert body.outputs == ("buf1",)
    assert not {"buf3", "buf4"} & set(body.storages)


def test_what_may_be_a_view_of_two_keeps_both():
    views = {"buf3": ("buf0", "buf1")}
    body = read_body(BODY, ["primals_1"], ["primals_1", "primals_2"], lambda _: None, lambda name: views.get(name, ()))
    assert body.storages["buf0"].kind == body.storages["buf1"].kind == "held"


def test_bytes_of_a_strided_tensor_are_what_it_spans():
    assert dense_bytes((2, 3), (4, 1), 4) == 28
    assert dense_bytes((0, 3), (3, 1), 4) == 0


def test_live_bytes_are_summed_step_by_step():
    assert live_bytes([(0, 2, 10), (1, 3, 5)], 4) == [10, 15, 5, 0]
