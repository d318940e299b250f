"""What cheap ops make of what lies there anyway is made again in a later region, and not handed on to it."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.facts import nbytes
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.transforms.tile_bodies import programs
from memo_compile.passes.transforms.tiles import TILED, places_of, tile_regions
from memo_compile.runtime.ops import register

register()
COUNT, WIDTH = 32, 8
WIDE = COUNT * WIDTH * 8  # bytes of a value in float64


def two_sided(x, scale, weight):
    """Two regions with a sum over tokens between them; both read `x` and what is made of it."""
    scaled = x * scale
    after = torch.ops.aten.cumsum.default(torch.tanh(scaled) @ weight, 0)
    return (torch.tanh(after) + scaled) * x


def one_sided(x, scale, weight):
    """The same where the second region does not read `x`."""
    scaled = x * scale
    after = torch.ops.aten.cumsum.default(torch.tanh(scaled) @ weight, 0)
    return torch.exp(torch.tanh(after) + scaled)


def returned(x, scale, weight):
    """The same where the caller reads what both regions do."""
    scaled = x * scale
    after = torch.ops.aten.cumsum.default(torch.tanh(scaled) @ weight, 0)
    return scaled, (torch.tanh(after) + scaled) * x


def constant_for_both(x, scale, weight):
    """Two regions read a constant, and a value that is made of small ones."""
    zeros = torch.ops.aten.full.default([COUNT, WIDTH], 0.5, dtype=x.dtype)
    places = torch.arange(COUNT, dtype=x.dtype)[:, None] * scale
    after = torch.ops.aten.cumsum.default(torch.tanh(x * places + zeros) @ weight, 0)
    return (torch.tanh(after * places) + torch.maximum(after, zeros)) * x


def traced(fn, tensors):
    gm = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    (x, *_) = gm.graph.find_nodes(op="placeholder")
    x.meta[TOKENS] = TokenInfo(axis=TokenAxis(0, 1, COUNT, 1), operands=(), sliceable=True, mixing=False, reason="")
    return gm


@pytest.mark.parametrize(("fn", "handed_on"), [(two_sided, 1), (one_sided, 2), (returned, 2)])
def test_rows_that_are_cheap_are_made_on_both_sides(fn, handed_on):
    torch.manual_seed(0)
    shapes = ((COUNT, WIDTH), (WIDTH,), (WIDTH, WIDTH))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    gm = traced(fn, tensors)
    wanted = gm(*tensors)
    tile_regions(gm, 4, WIDE, fused=False, prefix="call")
    calls = [n for n in gm.graph.nodes if str(n.target) == TILED]
    assert len(places_of(calls[0])) == handed_on
    assert len(calls) == 2
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)
    programs().clear()


def test_a_saved_value_lives_longer_where_two_are_not_handed_on_for_it():
    """As a normalized value, and that times a weight."""

    def two(x, scale, weight):
        scaled = x * scale
        shifted = scaled + scale
        after = torch.ops.aten.cumsum.default(torch.tanh(shifted) @ weight, 0)
        return torch.exp(torch.tanh(after) + scaled) * shifted

    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((COUNT, WIDTH), (WIDTH,), (WIDTH, WIDTH))]
    gm = traced(two, tensors)
    wanted = gm(*tensors)
    tile_regions(gm, 4, WIDE, fused=False, prefix="call")
    calls = [n for n in gm.graph.nodes if str(n.target) == TILED]
    assert [len(places_of(call)) for call in calls] == [1, 1]
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)
    programs().clear()


def test_what_no_region_makes_is_made_by_each_that_reads_it():
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((COUNT, WIDTH), (WIDTH,), (WIDTH, WIDTH))]
    gm = traced(constant_for_both, tensors)
    wanted = gm(*tensors)
    tile_regions(gm, 4, WIDE, fused=False, prefix="call")
    calls = [n for n in gm.graph.nodes if str(n.target) == TILED]
    whole = [a for call in calls for a in call.args[1] if a.op == "call_function" and nbytes(a) >= WIDE]
    assert [str(a.target) for a in whole] == ["aten.cumsum.default"]
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)
    programs().clear()
