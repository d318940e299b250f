"""What is said to go row by row does: rows computed alone are those of the whole."""

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

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


def bias_by_pairs(x, table, places):
    """A bias for each pair of tokens, looked up in a small table, that no data reaches."""
    bias = aten.embedding.default(table, (places[None] - places[:, None]).clamp(-4, 3) + 4)
    return (x @ x.transpose(1, 2) + bias.permute(2, 0, 1)).exp()


def table_of_pairs(x, table, places):
    """That table's gradient."""
    index = (places[None] - places[:, None]).clamp(-4, 3) + 4
    values = (x @ x.transpose(1, 2)).exp().permute(1, 2, 0)
    zeros = aten.full.default(list(table.shape), 0, dtype=x.dtype)
    return aten._unsafe_masked_index_put_accumulate.default(zeros, (index != 3)[..., None], [index], values)


def traced(fn, *tensors):
    gm = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    (x, *_) = gm.graph.find_nodes(op="placeholder")
    x.meta[TOKENS] = TokenInfo(axis=TokenAxis(1, 1, COUNT, 1), operands=(), sliceable=True, mixing=False, reason="")
    return gm


def pairs(buckets=8):
    return torch.randn(2, COUNT, 8, dtype=torch.float64), torch.randn(buckets, 2, dtype=torch.float64)


def test_what_is_looked_up_for_pairs_of_tokens_has_rows_of_its_own():
    """Back through views and the lookup, to what the indices are made of."""
    gm = traced(bias_by_pairs, *pairs(), torch.arange(COUNT))
    rows = tile_rows(gm)
    (found,) = (n for n in gm.graph.nodes if n.target is aten.embedding.default)
    assert rows[found].axis.dim == 0
    assert [need is None for need in rows[found].needs] == [True, False]
    assert rows[found.args[1]].axis.dim == 0


@pytest.mark.parametrize(("buckets", "summed"), [(8, True), (COUNT * COUNT // 8, False)])
def test_each_tile_makes_a_small_table_of_its_own(buckets, summed):
    gm = traced(table_of_pairs, *pairs(buckets), torch.arange(COUNT))
    (put,) = (n for n in gm.graph.nodes if "index_put" in str(n.target))
    assert (put in tile_rows(gm)) is summed
    assert not summed or tile_rows(gm)[put].summed
