"""What lies unread at the moment that holds the most comes from the host once more."""

import pytest
import torch
import torch.fx as fx

import memo_compile
from memo_compile.models import Llama, LlamaConfig
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import nbytes
from memo_compile.passes.transforms.prefetches import schedule_prefetches
from memo_compile.passes.transforms.refetches import fetch_again
from memo_compile.passes.transforms.slices import fetch
from memo_compile.runtime.ops import register

aten = torch.ops.aten
WIDE = (64, 8)
SIZE = 64 * 8 * 8  # bytes


class Backward:
    """A backward that reads a value from the host, does something else, and reads it again."""

    def __init__(self):
        register()
        self.mode = torch._subclasses.FakeTensorMode()
        self.graph = fx.Graph()
        self.lease = self.input("lease", (SIZE,), torch.uint8)
        self.x = self.input("x", WIDE)
        self.mark = self.graph.call_function(fetch, (self.lease, 0, WIDE, torch.float64))
        self.mark.meta["val"] = self.fake(WIDE)

    def fake(self, shape, dtype=torch.float64):
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def input(self, name, shape, dtype=torch.float64):
        node = self.graph.placeholder(name)
        node.meta["val"] = self.fake(shape, dtype)
        return node

    def op(self, target, *args):
        return call(self.graph, target, args)

    def returning(self, *results):
        self.graph.output(tuple(results))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def most(gm):
    return max(lifetimes(gm, fused=False).live_bytes())


def again(gm, least=0):
    return fetch_again(gm, lifetimes(gm, fused=False).live_bytes(), least)


def marks(gm):
    return [n for n in gm.graph.nodes if n.target is fetch]


def read_twice(first, second, *, middle=True):
    """`first` and `second` read the value; between them others are at their widest."""
    b = Backward()
    begun = b.op(aten.sum.default, first(b))
    wide = b.op(aten.tanh.default, b.op(aten.exp.default, b.op(aten.cos.default, b.x))) if middle else b.x
    narrow = b.op(aten.sum.default, wide)
    return b.returning(begun, narrow, b.op(aten.sum.default, second(b)))


def plainly(b):
    return b.op(aten.sin.default, b.mark)


def by_a_view(b):
    return b.op(aten.sin.default, b.op(aten.permute.default, b.mark, [1, 0]))


@pytest.mark.parametrize("first", [plainly, by_a_view])
@pytest.mark.parametrize("second", [plainly, by_a_view])
def test_it_comes_again_behind_the_widest_moment(first, second):
    gm = read_twice(first, second)
    before = most(gm)
    again(gm)
    one, other = marks(gm)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    (widest,) = gm.graph.find_nodes(op="call_function", target=aten.tanh.default)
    assert order[one] < order[widest] < order[other]
    assert one.args == other.args
    assert before - SIZE <= most(gm) < before - SIZE + 64  # scalars lie beside


def test_each_has_a_place_and_a_copy_of_its_own():
    gm = schedule_prefetches(again(read_twice(plainly, by_a_view)), lambda _: 1e-3, 1e9, overlap=False)
    copies = gm.graph.find_nodes(op="call_function", target=torch.ops.memo.prefetch_.default)
    waits = gm.graph.find_nodes(op="call_function", target=torch.ops.memo.wait_.default)
    assert len({n.args[0] for n in copies}) == len(copies) == len(waits) == 2
    assert {n.args[1:] for n in copies} == {n.args[1:] for n in waits}
    assert [nbytes(n.args[0]) for n in copies] == [SIZE, SIZE]


def test_a_reader_may_read_it_in_two_ways():
    def twice(b):
        turned = b.op(aten.permute.default, b.mark, [1, 0])
        return b.op(aten.mul.Tensor, b.mark, b.op(aten.permute.default, turned, [1, 0]))

    gm = again(read_twice(plainly, twice))
    _, other = marks(gm)
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert product.args[0] is other
    assert product.args[1].args[0].args[0] is other


def test_where_it_is_not_in_the_way_it_comes_once():
    assert len(marks(again(read_twice(plainly, plainly, middle=False)))) == 1


def test_where_the_other_graph_holds_as_much_it_comes_once():
    gm = read_twice(plainly, plainly)
    assert len(marks(again(gm, least=most(gm)))) == 1


def test_what_is_returned_stays():
    b = Backward()
    narrow = b.op(aten.sum.default, b.op(aten.tanh.default, b.op(aten.exp.default, b.op(aten.cos.default, b.x))))
    assert len(marks(again(b.returning(b.op(aten.sum.default, plainly(b)), narrow, b.mark)))) == 1


def overwritten_by_a_copy(b):
    return b.op(aten.copy_.default, b.mark, b.op(aten.full.default, list(WIDE), 1.0))


def overwritten_by_a_result(b):
    return b.op(torch.ops.memo.onto.default, b.mark, list(WIDE), [8, 1])


def overwritten_by_an_op(b):
    return b.op(aten.mul_.Tensor, b.op(aten.view.default, b.mark, [8, 64]), 2.0)


@pytest.mark.parametrize("write", [overwritten_by_a_copy, overwritten_by_a_result, overwritten_by_an_op])
def test_what_is_written_over_is_no_longer_what_the_host_has(write):
    assert len(marks(again(read_twice(lambda b: (write(b), plainly(b))[1], plainly)))) == 1


def inputs_of_layers():
    """A model of which gradients are small, and its step."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=64, layers=3, width=32, heads=4, kv_heads=2, ffn=96)).double()
    x = torch.randint(0, 64, (1, 512))

    def step(fn):
        model.zero_grad(set_to_none=True)
        loss = fn(x, labels=x)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    return model, step


@pytest.mark.parametrize("verify", [False, "poison"])
def test_at_the_least_slices_come_again_and_are_what_they_were(verify):
    model, step = inputs_of_layers()
    expected = step(model)
    compiled = torch.compile(model, backend="memo_eager", options={"memory_budget": "min", "verify": verify})
    step(compiled)
    before = memo_compile.transfer_stats()
    got = step(compiled)
    after = memo_compile.transfer_stats()
    assert after.copies_in - before.copies_in > after.copies_out - before.copies_out > 0
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    (plan,) = memo_compile.plans()
    assert memo_compile.measure_peak(lambda: step(compiled)) <= 1.01 * plan.predicted_peak + 8192


def test_where_a_budget_has_room_for_all_nothing_comes_twice():
    model, step = inputs_of_layers()
    compiled = torch.compile(model, backend="memo_eager", options={"memory_budget": 0.6})
    step(compiled)
    before = memo_compile.transfer_stats()
    step(compiled)
    after = memo_compile.transfer_stats()
    assert after.copies_in - before.copies_in == after.copies_out - before.copies_out


def test_rows_that_were_kept_beside_it_let_it_come_once():
    """They would have to stay in between, and lie beside the whole before."""
    b = Backward()
    kept = b.input("kept", WIDE)
    whole = b.op(aten.cat.default, [b.mark, kept], 0)
    begun = b.op(aten.sum.default, b.op(aten.sin.default, whole))
    wide = b.op(aten.tanh.default, b.op(aten.exp.default, b.op(aten.cos.default, b.x)))
    ended = b.op(aten.sum.default, b.op(aten.sin.default, whole))
    assert len(marks(again(b.returning(begun, b.op(aten.sum.default, wide), ended)))) == 1


def test_what_a_later_reader_looks_at_may_be_made_as_late():
    def sized(b):
        first = plainly(b)
        return b.op(aten.mul.Tensor, first, b.op(aten.as_strided.default, b.mark, [1, 8], [8, 1]))

    gm = again(read_twice(plainly, sized))
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    (view,) = gm.graph.find_nodes(op="call_function", target=aten.as_strided.default)
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert order[view] == order[product] - 1


def test_a_value_joined_with_itself_lands_in_a_place_of_its_own():
    b = Backward()
    twice = b.op(aten.cat.default, [b.mark, b.mark], 0)
    gm = schedule_prefetches(b.returning(b.op(aten.sum.default, twice)), lambda _: 1e-3, 1e9, overlap=False)
    (cat,) = gm.graph.find_nodes(op="call_function", target=aten.cat.default)
    (copy,) = gm.graph.find_nodes(op="call_function", target=torch.ops.memo.prefetch_.default)
    assert cat.args[0] == [copy.args[0], copy.args[0]]
