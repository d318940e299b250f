"""Rows of a tile's results lie over those of operands that nothing else reads any more, and over no others."""

import pytest
import torch
from torch._guards import TracingContext, tracing
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.codegen.lowerings import POISON, register_lowerings
from memo_compile.codegen.tile_bodies import compile_bodies
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.facts import storage_of
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.transforms.attention import write_over_attention_inputs
from memo_compile.passes.transforms.tile_places import write_over_operands
from memo_compile.passes.transforms.tiles import TILED, places_of, tile_regions
from memo_compile.runtime.ops import register

register()
COUNT, WIDTH = 32, 8
WIDE = COUNT * WIDTH * 8  # bytes of a value in float64
ONTO = torch.ops.memo.onto.default
cumsum, cat = torch.ops.aten.cumsum.default, torch.ops.aten.cat.default


def front(x, weight):
    """What an earlier region makes, and sums over tokens of it, which end that region."""
    a = torch.tanh(x) @ weight
    return a, cumsum(a, 0)


def read_last(x, weight):
    a, c = front(x, weight)
    return torch.exp(torch.tanh(a) + c)


def halves_change_places(x, weight):
    """Rows are read in another order than that in which they are written."""
    a, c = front(x, weight)
    left, right = torch.ops.aten.split.Tensor(a, WIDTH // 2, 1)
    return torch.exp(cat([-right, left], 1) * a + c)


def two_results(x, weight):
    """Both operands give way to results that are made of both."""
    a, c = front(x, weight)
    c = c @ weight
    both = torch.tanh(a) + c + cumsum(c, 0)
    return torch.exp(both) @ weight, torch.exp(both * a * c)


def with_a_view(x, weight):
    """A view of an operand is a result as well, which is written before results that lie over operands."""
    a, c = front(x, weight)
    c = c @ weight
    bent = torch.tanh(a)
    result = torch.exp(bent + c + cumsum(c, 0))
    view = torch.ops.aten.unsqueeze.default(a, 1)
    return result, torch.tanh(view) * result.unsqueeze(1) * bent.unsqueeze(1), cumsum(view, 0)


def with_a_sum(x, weight):
    """Sums over tokens read the operand as well."""
    a, c = front(x, weight)
    both = torch.tanh(a) + c
    return torch.exp(both), a.permute(1, 0) @ both


def read_later(x, weight):
    a, c = front(x, weight)
    result = torch.exp(torch.tanh(a) + c)
    return result, cumsum(a, 0)


def read_later_as_a_view(x, weight):
    a, c = front(x, weight)
    turned = a.t()
    result = torch.exp(torch.tanh(a) + c)
    return result, cumsum(turned, 1)


def returned(x, weight):
    a, c = front(x, weight)
    return a, torch.exp(torch.tanh(a) + c)


def read_by_what_is_moved(x, weight):
    """`late` reads a result of the region as well: it stands before the region's last operand, and runs after it."""
    a, c = front(x, weight)
    result = torch.exp(torch.tanh(a) + c)
    late = cat([result, a], 0)
    return torch.tanh(torch.tanh(result) + cumsum(x, 0)), late


def read_by_a_region_that_waits(x, weight):
    """`other` stands before the region's last op, in a region that runs after it."""
    a, c = front(x, weight)
    both = torch.tanh(a) + c
    other = torch.cos(a)
    result = torch.cos(both + cumsum(x, 0))
    return torch.sin(other + cumsum(result, 0))


def read_by_what_waits_for_a_region(x, weight):
    """`late` reads what a region makes that has begun before, and runs after."""
    a, c = front(x, weight)
    begun = torch.sin(x)
    result = torch.exp(torch.tanh(a) + c)
    other = torch.exp(torch.sin(begun) + cumsum(result, 0))
    late = cat([other, a], 0)
    return torch.tanh(torch.tanh(result) + cumsum(x, 0)), late


def read_whole(x, weight):
    """Each row of the result reads all rows of the operand."""
    a, c = front(x, weight)
    return torch.exp((torch.tanh(a) @ a.t()) @ (torch.tanh(a) + c))


def turned(x, weight):
    """Of the result, rows of tokens lie elsewhere."""
    a, c = front(x, weight)
    return torch.ops.aten.clone.default(torch.exp(torch.tanh(a) + c).t(), memory_format=torch.contiguous_format)


def of_another_type(x, weight):
    a, c = front(x, weight)
    return (torch.tanh(a) + c).to(torch.int64)


def part_of_a_value(x, weight):
    """The operand is half of what lies in its storage."""
    a = torch.ops.aten.clone.default((torch.tanh(x) @ weight).t(), memory_format=torch.contiguous_format)
    half = torch.ops.aten.slice.Tensor(a, 0, WIDTH // 2, WIDTH)
    return torch.exp(torch.tanh(half) + cumsum(half, 1))


def spread(x, weight):
    """The operand has one element of its storage in many places."""
    a = torch.tanh(x) @ weight
    first = torch.ops.aten.slice.Tensor(a, 1, 0, 1).expand(COUNT, WIDTH)
    return torch.exp(torch.tanh(first) + cumsum(first, 0))


def the_callers(x, weight):
    return torch.exp(torch.tanh(x) + cumsum(x, 0))


WRITTEN = [(read_last, 1), (halves_change_places, 1), (two_results, 2), (with_a_view, 2), (with_a_sum, 1)]
NOT_WRITTEN = [
    read_later,
    read_later_as_a_view,
    returned,
    read_by_what_is_moved,
    read_whole,
    turned,
    of_another_type,
    part_of_a_value,
    spread,
    the_callers,
]


def given():
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in ((COUNT, WIDTH), (WIDTH, WIDTH))]


def traced(fn):
    gm = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*given())
    (x, _) = gm.graph.find_nodes(op="placeholder")
    x.meta[TOKENS] = TokenInfo(axis=TokenAxis(0, 1, COUNT, 1), operands=(), sliceable=True, mixing=False, reason="")
    return gm


def tiled(gm, tiles=4):
    tile_regions(gm, tiles, WIDE // 2, fused=False, prefix="call")
    write_over_operands(gm, fused=False)
    return gm, list(gm.graph.find_nodes(op="call_function", target=ONTO))


@pytest.mark.parametrize("tiles", [4, 5])
@pytest.mark.parametrize(("fn", "count"), WRITTEN)
def test_results_lie_over_what_is_read_last(fn, count, tiles):
    gm, places = tiled(traced(fn), tiles)
    assert len(places) == count
    for place in places:
        assert storage_of(place) is storage_of(place.args[0])
    torch.testing.assert_close(gm(*given()), fn(*given()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fn", NOT_WRITTEN)
def test_what_others_read_keeps_its_place(fn):
    gm, places = tiled(traced(fn))
    assert not places
    assert [n for n in gm.graph.nodes if str(n.target) == TILED]
    torch.testing.assert_close(gm(*given()), fn(*given()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiles", [3, 4])
@pytest.mark.parametrize("fn", [read_by_a_region_that_waits, read_by_what_waits_for_a_region])
def test_values_are_right_wherever_results_lie(fn, tiles):
    gm, _ = tiled(traced(fn), tiles)
    torch.testing.assert_close(gm(*given()), fn(*given()), rtol=1e-12, atol=1e-12)


def attention(x, weight):
    """Its output lies over its queries."""
    q, k, v = ((f(x) @ weight).view(1, COUNT, 2, 4).permute(0, 2, 1, 3) for f in (torch.tanh, torch.cos, torch.sin))
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True)
    rows = out.permute(0, 2, 1, 3).reshape(COUNT, WIDTH)
    return out, torch.exp(torch.tanh(rows) + cumsum(rows, 0))


@pytest.mark.parametrize("later", ["nowhere", "returned", "read", "copied to the host"])
def test_an_output_of_attention_is_written_over_where_it_is_read_last(later):
    def fn(x, weight):
        out, result = attention(x, weight)
        if later == "read":
            return result, cumsum(out, 2)
        return (result, out) if later == "returned" else (result,)

    gm = traced(fn)
    write_over_attention_inputs(gm)
    item = next(n for n in gm.graph.nodes if n.name == "getitem")
    axis = TokenAxis(2, 1, COUNT, 1)
    item.meta[TOKENS] = TokenInfo(axis=axis, operands=(), sliceable=False, mixing=True, reason="")
    if later == "copied to the host":
        copied_to_the_host(item)
    gm, places = tiled(gm)
    assert len(places) == (later == "nowhere")
    if later != "copied to the host":
        torch.testing.assert_close(gm(*given()), fn(*given()), rtol=1e-12, atol=1e-12)


def copied_to_the_host(node):
    (x, *_) = node.graph.find_nodes(op="placeholder")
    with node.graph.inserting_after(node):
        node.graph.call_function(torch.ops.memo.offload.default, (node, x, 0)).meta["val"] = None


def test_what_is_copied_to_the_host_keeps_its_place():
    """The copy reads on when what comes after it has started."""
    gm = traced(read_last)
    copied_to_the_host(next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mm.default))
    assert not tiled(gm)[1]


def test_a_tile_is_not_given_what_it_writes_over():
    gm, (place,) = tiled(traced(read_last))
    call = next(n for n in gm.graph.nodes if str(n.target) == TILED and place in places_of(n))
    assert storage_of(place) not in map(storage_of, call.args[1])


# As Inductor emits it.


def compiled(gm):
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    register_lowerings()
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    with tracing(TracingContext(values[0].fake_mode)), config.patch(force_disable_caches=True):
        compile_bodies(gm)
        return compile_fx_inner(gm, values)


def listed(fn):
    """The same, of a graph that returns a list."""

    def step(*args):
        made = fn(*args)
        return list(made) if isinstance(made, tuple) else [made]

    return step


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize(("fn", "count"), WRITTEN)
def test_inductor_writes_them_there(fn, count, poisoned):
    gm, places = tiled(traced(listed(fn)))
    assert len(places) == count
    for node in gm.graph.nodes if poisoned else ():
        node.meta[POISON] = True
    same(compiled(gm)(given()), listed(fn)(*given()))


def lazily_read(x, weight):
    """Inductor computes `value` where it is added up, after the region has run."""
    a, c = front(x, weight)
    value = torch.ops.prims.rev.default(a, [0])
    return torch.exp(torch.tanh(a) + c), torch.ops.aten.sum.default(value / 2)


def joined_with_others(x, weight):
    """Inductor makes the operand in its place in `value`, so that there is no copy of it."""
    a, c = front(x, weight)
    c = c @ weight
    value = cat([c, x], 0)
    both = torch.tanh(a) + c + cumsum(c, 0)
    return torch.exp(both) @ weight, torch.exp(both * a * c), cumsum(value, 0)


def the_callers_copied(x, weight):
    """Inductor lowers the copy to nothing, so that the operand is the caller's."""
    more, copy = x + 1, torch.ops.aten.clone.default(x)  # `x` is not read later: the copy is not made again
    return torch.exp(torch.tanh(copy) + cumsum(copy, 0)), more


@pytest.mark.parametrize("fn", [lazily_read, joined_with_others, the_callers_copied])
def test_what_inductor_computes_later_is_computed_from_the_operand(fn):
    gm, places = tiled(traced(listed(fn)))
    assert places
    same(compiled(gm)(given()), listed(fn)(*given()))
