"""A long sum of matmuls or of reductions is added up as its terms come."""

import contextlib

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import memo_compile
from memo_compile.codegen.lowerings import register_lowerings
from memo_compile.codegen.preview import dry_run
from memo_compile.codegen.scheduler.fusion import wait_for_matmuls
from memo_compile.passes.transforms.sums import add_as_they_come, is_partial
from memo_compile.runtime.ops import register

register()
register_lowerings()
CHUNK, WIDTH, TERMS = 64, 768, 8
ONE = WIDTH * WIDTH * 4


def matmuls(rows, gradients):
    """One after the other, as they are asked for."""
    return (g.t() @ r for r, g in zip(rows.split(CHUNK), gradients.split(CHUNK), strict=True))


def summed(rows, gradients):
    """A weight gradient, chunk by chunk."""
    terms = matmuls(rows, gradients)
    total = next(terms)
    for term in terms:
        total = total + term
    return (total * 2,)


def cast(rows, gradients):
    terms = (p.double() for p in matmuls(rows, gradients))
    total = next(terms)
    for term in terms:
        total = total + term
    return (total.float(),)


def three_terms(rows, gradients):
    first, second, third, *_ = matmuls(rows, gradients)
    return (first + second + third,)


def read_twice(rows, gradients):
    """Partial sums that something else reads are in memory anyway."""
    terms = matmuls(rows, gradients)
    total = next(terms)
    sums = []
    for term in terms:
        total = total + term
        sums.append(total.sum())
    return (total, torch.stack(sums))


def biases(rows, gradients):
    """The bias gradient of a layer that is used again: what is reduced comes out of one matmul after the other."""
    weight, total = rows.t() @ rows / WIDTH, None
    for _ in range(TERMS):
        gradients = torch.tanh(gradients @ weight)
        term = gradients.sum(0, keepdim=True).view(WIDTH)
        total = term if total is None else total + term
    return (total,)


def given():
    torch.manual_seed(0)
    return torch.randn(CHUNK * TERMS, WIDTH), torch.randn(CHUNK * TERMS, WIDTH)


def traced(fn):
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given())


def partial_sums(gm):
    return sum(is_partial(n) for n in gm.graph.nodes if n.op == "call_function" and n.all_input_nodes)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [(summed, TERMS - 2), (cast, TERMS - 2), (biases, TERMS - 1), (three_terms, 0), (read_twice, 0)],
)
def test_all_partial_sums_of_a_long_sum_but_the_last_are_kept(fn, expected):
    assert partial_sums(add_as_they_come(traced(fn))) == expected


@pytest.mark.parametrize("fn", [summed, cast, biases, three_terms, read_twice])
def test_what_is_computed_stays_the_same_bit_by_bit(fn):
    gm = traced(fn)
    expected = fn(*given())
    for got, want in zip(add_as_they_come(gm)(*given()), expected, strict=True):
        assert torch.equal(got, want)


def peak(gm, *, guarded):
    waits = inductor_config.patch("_pre_fusion_custom_pass", wait_for_matmuls)
    with waits if guarded else contextlib.nullcontext(), inductor_config.patch(allow_buffer_reuse=False):
        body = dry_run(gm, is_backward=False)
    live = [s for s in body.storages.values() if s.kind == "allocated"]
    return max(sum(s.bytes for s in live if s.start <= step < s.end) for step in range(body.steps))


def test_no_more_than_a_few_terms_are_held():
    """The sum so far and the next, in twice the bytes, and a term. Uncast terms become `addmm` by themselves."""
    assert peak(traced(cast), guarded=True) >= TERMS * ONE
    assert peak(add_as_they_come(traced(cast)), guarded=True) < 5 * ONE


def test_a_partial_sum_does_not_wait_for_the_next_matmul():
    """Inductor would join the kernels of all partial sums after the last matmul."""
    assert peak(add_as_they_come(traced(cast)), guarded=False) >= TERMS * ONE


def test_what_is_reduced_is_not_held_until_the_last_reduction():
    one = CHUNK * TERMS * WIDTH * 4
    assert peak(traced(biases), guarded=True) >= TERMS * one
    assert peak(add_as_they_come(traced(biases)), guarded=True) <= ONE + 2.1 * one


class Used(torch.nn.Module):
    """One layer with a bias, used again and again."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(32, 128, bias=bias), torch.nn.Linear(128, 32, bias=bias)

    def forward(self, x):
        for _ in range(6):
            x = x + self.down(torch.tanh(self.up(x)))
        return x.square().mean()


def test_biases_of_a_layer_that_is_used_again_cost_the_least_plan_nothing():
    x = torch.randn(2048, 32)
    model, held = Used(True), {}
    model(x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for bias in (False, True):
        torch._dynamo.reset()
        model = Used(bias)
        fn = torch.compile(model, backend="memo", options={"memory_budget": "min"})
        fn(x).backward()
        if bias:
            for p, want in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        model.zero_grad(set_to_none=True)
        held[bias] = memo_compile.measure_peak(lambda fn=fn: fn(x).backward())
    assert held[True] <= 1.15 * held[False]


class Gram(torch.nn.Module):
    """Two layers, and the matmuls of what they give with itself, summed chunk by chunk."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, rows):
        made = self.second(torch.sin(self.first(rows)))
        (total,) = cast(made, made)
        return (total / CHUNK).tanh().sum()


def test_gradients_where_slices_move_beside_a_long_sum():
    torch.manual_seed(0)
    model, rows = Gram(), torch.randn(CHUNK * TERMS, WIDTH)
    model(rows).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    torch.compile(model, backend="memo", options={"offload": "all"})(rows).backward()
    assert memo_compile.plans()[-1].offloaded_bytes > 0
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
