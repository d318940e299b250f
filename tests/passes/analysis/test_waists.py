"""A region that holds less as two calls is two: all that leads from one to the other is a waist."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.analysis.regions import find_regions
from memo_compile.passes.analysis.tile_rows import tile_rows
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.analysis.waists import MOST, divisions
from memo_compile.passes.fx.meta import TOKENS

COUNT, WIDTH = 32, 64
WIDE = COUNT * WIDTH * 8  # bytes of a value in float64


def traced(fn, inputs):
    gm = make_fx(fn, tracing_mode="fake")(*(torch.randn(COUNT, WIDTH, dtype=torch.float64) for _ in range(inputs)))
    for node in gm.graph.find_nodes(op="placeholder"):
        axis = TokenAxis(0, 1, COUNT, 1)
        node.meta[TOKENS] = TokenInfo(axis=axis, operands=(), sliceable=True, mixing=False, reason="")
    return gm


def results(fn, inputs):
    """The names of what each region makes."""
    return [[n.name for n in region.results] for region in find_regions(traced(fn, inputs), WIDE)]


def two_layers(x, a, b):
    """Each reads something of its own; the second need not be there before the first is done."""
    between = torch.tanh(x) * torch.tanh(a)
    return torch.sin(torch.exp(between) * torch.cos(b))


def test_layers_that_each_read_something_are_two_regions():
    assert results(two_layers, 3) == [["mul"], ["sin"]]


def test_what_is_held_is_that_of_the_wider_call():
    gm = traced(two_layers, 3)
    part = [n for n in gm.graph.nodes if n.op == "call_function"]
    first, *_ = divisions(part, tile_rows(gm))
    # x, a and what is between; then b and the result, which lies where what is between did.
    assert first.held == 3 * WIDE
    assert {n.name for n in first.before} == {"tanh", "tanh_1", "mul"}
    assert first.before | first.after == set(part)
    assert not first.before & first.after


def one_operand_for_both(x, a, b):
    """Nothing may go before the second."""
    between = torch.tanh(x) * torch.tanh(a)
    return torch.sin(torch.exp(between) * torch.cos(a))


def led_around(x, a, b):
    """What is made before is read behind, too: it would have to be kept."""
    left = torch.tanh(a)
    between = torch.tanh(x) * left
    return torch.sin(torch.exp(between) * torch.cos(b) * left)


def there_early(x, a, b):
    """The second's operand is a result of the graph's own, and takes its place in any case."""
    made = torch.cumsum(b, 0)
    between = torch.tanh(x) * torch.tanh(a)
    return torch.sin(torch.exp(between) * torch.cos(made))


@pytest.mark.parametrize("fn", [one_operand_for_both, led_around, there_early])
def test_where_nothing_is_gained_there_is_one_region(fn):
    assert results(fn, 3) == [["sin"]]


def test_each_side_makes_something_wide_that_goes_with_its_tiles():
    def bare(x, a, b):
        return torch.tanh(x) * torch.tanh(a) * b

    assert results(bare, 3) == [["mul_1"]]


def test_many_layers_are_many_regions():
    def layers(x, *others):
        for other in others:
            x = torch.tanh(x) * torch.cos(other)
        return x

    assert len(results(layers, 5)) == 4


def test_of_very_many_nodes_none_is_looked_at():
    def deep(x, a, b):
        for _ in range(MOST):
            x = torch.neg(x)
        return two_layers(x, a, b)

    gm = traced(deep, 3)
    assert divisions([n for n in gm.graph.nodes if n.op == "call_function"], tile_rows(gm)) == []
