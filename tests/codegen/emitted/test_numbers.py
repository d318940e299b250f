"""Symbols of emitted text in numbers: nothing else of it changes."""

from memo_compile.codegen.emitted.numbers import numbered

VALUES = {"s0": 12, "s1": 5}


def test_lines_keep_their_number_and_their_indentation():
    lines = [
        "    # Topologically Sorted Source Nodes: [s0]",
        "    with torch.cuda._DeviceGuard(0):",
        "        buf1 = reinterpret_tensor(buf0, (s0, 4), (4, 1), 0); del buf0  # reuse",
        "    buf2 = empty_strided_cpu((s0 - (11*s0) // 16, max(1, s1)), (s1, 1), torch.float32)",
        "    cpp_fused_0(buf2, s0, s0x)",
    ]
    assert numbered(lines, VALUES) == [
        *lines[:2],
        "        buf1 = reinterpret_tensor(buf0, (12, 4), (4, 1), 0); del buf0",
        "    buf2 = empty_strided_cpu((4, 5), (5, 1), torch.float32)",
        "    cpp_fused_0(buf2, 12, s0x)",
    ]


def test_text_without_symbols_is_the_same_object_by_object():
    lines = ["    buf0 = empty_strided_cpu((2, ), (1, ), torch.float32)  # as it was"]
    assert numbered(lines, VALUES) == lines
    assert numbered(lines, {}) == lines


def test_a_value_that_is_assigned_keeps_its_name():
    assert numbered(["s0 = arg0_1.size(0)"], VALUES) == ["s0 = arg0_1.size(0)"]
