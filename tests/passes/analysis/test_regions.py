"""Regions hold what goes row by row between wide values, and end where rows of others are read."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.analysis.regions import find_regions
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.meta import TOKENS

COUNT, WIDTH = 32, 256
WIDE = COUNT * WIDTH * 8  # bytes of a value in float64
cat, cumsum = torch.ops.aten.cat.default, torch.ops.aten.cumsum.default


def traced(fn, *shapes):
    gm = make_fx(fn, tracing_mode="fake")(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    (x, *_) = gm.graph.find_nodes(op="placeholder")
    x.meta[TOKENS] = TokenInfo(axis=TokenAxis(0, 1, COUNT, 1), operands=(), sliceable=True, mixing=False, reason="")
    return gm


def regions(fn, *shapes):
    return find_regions(traced(fn, *shapes), WIDE)


def turned_by_halves(x):
    """As rotary embeddings do: halves are narrow, what they are of and what is made of them is wide."""
    x = torch.tanh(x)
    left, right = torch.ops.aten.split.Tensor(x, WIDTH // 2, 1)
    return torch.exp(cat([-right, left], 1) * x)


def sliced_halves(x):
    x = torch.tanh(x)
    left = torch.ops.aten.slice.Tensor(x, 1, 0, WIDTH // 2)
    right = torch.ops.aten.slice.Tensor(x, 1, WIDTH // 2, WIDTH)
    return torch.exp(cat([-right, left], 1) * x)


@pytest.mark.parametrize("fn", [turned_by_halves, sliced_halves])
def test_halves_that_are_turned_are_in_the_region_of_what_they_are_made_of(fn):
    (region,) = regions(fn, (COUNT, WIDTH))
    assert {n.name for n in region.nodes} >= {"tanh", "neg", "cat", "exp"}
    assert [n.name for n in region.results] == ["exp"]


def test_halves_whose_rows_are_mixed_end_a_region():
    def mixed(x):
        x = torch.tanh(x)
        half = cumsum(torch.ops.aten.slice.Tensor(x, 1, 0, WIDTH // 2), 0)
        return torch.exp(cat([half, half], 1) * x)

    found = [n.name for region in regions(mixed, (COUNT, WIDTH)) for n in region.nodes]
    assert found
    assert "cumsum" not in found
    assert len(found) == len(set(found))


def test_what_nothing_wide_is_made_of_is_in_no_region():
    def narrow(x):
        x = torch.exp(torch.tanh(x) + 1)
        half = torch.ops.aten.slice.Tensor(x, 1, 0, WIDTH // 2)
        return x, torch.sin(torch.cos(half))

    (region,) = regions(narrow, (COUNT, WIDTH))
    assert "sin" not in {n.name for n in region.nodes}


def test_what_is_narrow_on_the_way_to_a_sum_or_to_a_wide_value_is_in_the_region():
    """As adapters make it: products over a few columns, and the gradients of their weights."""

    def adapted(x, down, up):
        x = torch.tanh(x)
        narrow = x @ down
        wide = torch.exp(x + narrow @ up)
        return wide, narrow.t() @ wide, x.t() @ (wide @ up.t())

    rank = WIDTH // 32
    (region,) = regions(adapted, (COUNT, WIDTH), (WIDTH, rank), (rank, WIDTH))
    assert [n.name for n in region.results] == ["exp"]
    assert len(region.sums) == 2
