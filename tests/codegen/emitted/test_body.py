"""The body that Inductor emits, read as storages and live ranges."""

from memo_compile.codegen.emitted.body import dense_bytes, live_bytes, read_body

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
    assert (body.storages["buf0"].start, body.storages["buf0"].end) == (0, 7)
    assert body.storages["buf0"].bytes == 4 * 8 * 4


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
    text = BODY.replace("del buf3", "del buf4\ncpp_fused_2(primals_1)\nbuf5 = buf3[1]\ndel buf3")
    sizes = {"buf3": ("workspace", 8), "buf4": ("kernel", 40), "buf5": ("kernel", 16)}
    storages = read_body(text, ["primals_1"], ["primals_1", "primals_2"], sizes.get).storages
    assert storages["buf4"].end == storages["buf5"].end


def test_what_lies_on_another_device_has_no_place():
    text = BODY.replace("buf1 = empty_strided_cpu", "buf1 = empty_strided_cuda")
    storages = read(text).storages
    assert (storages["buf1"].kind, storages["buf0"].kind) == ("allocated", "kernel")
    assert storages["buf0"].bytes == 0


def test_a_view_that_a_kernels_call_makes_lies_in_what_it_is_of():
    text = BODY.replace("kernel(buf1)", "view_as_complex.default(buf1)").replace("buf3[0]", "buf3") + "kernel(buf4)\n"
    views = {"buf3": ("buf1",), "buf4": ("buf3",)}
    body = read_body(text, ["buf4"], ["primals_1", "primals_2"], lambda _: None, lambda name: views.get(name, ()))
    assert body.outputs == ("buf1",)
    assert not {"buf3", "buf4"} & set(body.storages)


def test_what_may_be_a_view_of_two_keeps_both_to_the_end():
    views = {"buf3": ("buf0", "buf1")}
    body = read_body(BODY, ["primals_1"], ["primals_1", "primals_2"], lambda _: None, lambda name: views.get(name, ()))
    assert body.storages["buf0"].end == body.storages["buf1"].end == body.steps


def test_bytes_of_a_strided_tensor_are_what_it_spans():
    assert dense_bytes((2, 3), (4, 1), 4) == 28
    assert dense_bytes((0, 3), (3, 1), 4) == 0


def test_live_bytes_are_summed_step_by_step():
    assert live_bytes([(0, 2, 10), (1, 3, 5)], 4) == [10, 15, 5, 0]
