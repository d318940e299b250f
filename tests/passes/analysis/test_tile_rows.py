"""What is said to go row by row does: rows computed alone are those of the whole."""

import pytest
import torch
from torch import fx

from memo_compile.passes.analysis.tile_rows import tile_rows
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.transforms.token_slices import slice_value, sliced_copy
from memo_compile.runtime.ops import register

register()
TOKENS_AT, COUNT = 2, 64
AXIS = TokenAxis(TOKENS_AT, 1, COUNT, 1)
aten = torch.ops.aten


def value(size):
    return torch.randn(2, 3, COUNT, size, dtype=torch.float64)


def graph_of(target, args, inputs):
    """One op, of whose operands that many are inputs with tokens."""
    graph, mode = fx.Graph(), torch._subclasses.FakeTensorMode()
    places = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    for place, tensor in zip(places, inputs, strict=True):
        place.meta["val"] = mode.from_tensor(tensor)
        place.meta[TOKENS] = TokenInfo(axis=AXIS, operands=(), sliceable=True, mixing=False, reason="")
    node = graph.call_function(target, (*places, *args))
    with mode:
        node.meta["val"] = target(*(p.meta["val"] for p in places), *args)
    graph.output(node)
    return fx.GraphModule({}, graph), node


@pytest.mark.parametrize(
    ("target", "inputs", "args"),
    [
        (aten.slice_scatter.default, (value(8), value(4)), (3, 4, 9223372036854775807)),
        (aten.slice_scatter.default, (value(8), value(4)), (-1, 0, 4)),
        (aten._softmax_backward_data.default, (value(8), value(8)), (3, torch.float64)),
        (aten.slice.Tensor, (value(8),), (3, 2, 6)),
        (aten.mul.Tensor, (value(8), value(8)), ()),
        (torch.ops.memo.keep.default, (value(8),), ()),
    ],
)
def test_rows_alone_are_those_of_the_whole(target, inputs, args):
    torch.manual_seed(0)
    gm, node = graph_of(target, args, inputs)
    rows = tile_rows(gm)[node]
    whole = gm(*inputs)
    info = TokenInfo(axis=rows.axis, operands=rows.needs, sliceable=True, mixing=False, reason="")
    with gm.graph.inserting_before(node):
        parts = {
            a: slice_value(gm.graph, a, need, 16, 48) for a, need in zip(node.all_input_nodes, rows.needs, strict=True)
        }
        alone = sliced_copy(gm.graph, node, info, parts, 16, 48)
    node.replace_all_uses_with(alone)
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), whole.narrow(rows.axis.dim, 16, 32), rtol=0, atol=0)


def test_a_slice_that_is_written_along_the_tokens_is_no_matter_of_single_rows():
    gm, node = graph_of(aten.slice_scatter.default, (TOKENS_AT, 4, COUNT), (value(8), value(8)[:, :, 4:]))
    assert node not in tile_rows(gm)
