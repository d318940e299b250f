"""Symbols of emitted text in numbers: nothing else of it changes."""

from types import SimpleNamespace

from torch._dynamo.source import ConstantSource
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv

from memo_compile.codegen.emitted.numbers import check_growing, numbered, symbols_at_hand

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


def symbol(environment, name, length):
    source = ConstantSource(name)
    return environment.create_unspecified_symint_and_symbol(length, source, DimDynamic.DYNAMIC)


def graph_of(environment, *spans):
    layouts = [SimpleNamespace(size=[span], stride=[1]) for span in spans]
    buffers = [SimpleNamespace(name="b", get_name=lambda: "b", layout=layout) for layout in layouts]
    sizes = SimpleNamespace(shape_env=environment, inv_precomputed_replacements={})
    return V.set_graph_handler(SimpleNamespace(sizevars=sizes, name_to_buffer=dict(enumerate(buffers))))


def test_lengths_that_are_found_to_be_equal_are_one():
    """The range is of the one that stays; what was made of the other before is as large as what is made of this."""
    environment = ShapeEnv()
    ids, mask = symbol(environment, "ids", 100), symbol(environment, "mask", 100)
    names = [n.node._expr for n in (ids, mask)]
    rest = names[0] - FloorDiv(31 * names[1], 32)
    assert bool(ids == mask)
    assert bool(ids <= 128)
    assert bool(ids >= 33)
    with graph_of(environment, rest):
        assert [symbols_at_hand()[str(n)] for n in names] == [128, 128]
        check_growing()
