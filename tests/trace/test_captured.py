"""Gradients that are taken inside of what is compiled: a budget is kept, or refused with what to do."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vjp

import memo_compile
from memo_compile.errors import CompiledAutograd, GradientsInside, UserStreams


def made():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
    return model, {k: v.detach() for k, v in model.named_parameters()}, torch.randn(2048, 64)


def refusal(step, *args):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        step(*args)
    return caught.value.inner_exception


@pytest.mark.parametrize("options", [{"memory_budget": "1MiB"}, {"memory_budget": "min"}, {"offload": "all"}])
@pytest.mark.parametrize("way", ["grad", "vjp"])
def test_a_budget_is_not_ignored(options, way):
    model, parameters, x = made()

    def loss(p):
        return functional_call(model, p, (x,)).square().mean()

    inside = grad(loss) if way == "grad" else lambda p: vjp(loss, p)[1](torch.ones(()))
    error = refusal(torch.compile(inside, backend="memo_eager", options=options), parameters)
    assert isinstance(error, GradientsInside)
    assert "loss.backward()" in str(error)


@pytest.mark.parametrize("options", [{}, {"memory_budget": "64MiB"}])
def test_what_fits_runs(options):
    model, parameters, x = made()
    step = grad(lambda p: functional_call(model, p, (x,)).square().mean())
    compiled = torch.compile(step, backend="memo_eager", options=options)
    for name, gradient in step(parameters).items():
        torch.testing.assert_close(compiled(parameters)[name], gradient)
    assert memo_compile.measure_peak(compiled, parameters) <= 64 * 2**20


def test_compiled_autograd_is_refused_where_something_is_planned():
    model, _, x = made()
    compiled = torch.compile(model, backend="memo_eager", options={"offload": "all"})
    with torch._dynamo.config.patch(compiled_autograd=True):
        assert isinstance(refusal(compiled, x), CompiledAutograd)
    torch._dynamo.reset()
    loss = compiled(x).square().mean()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="memo_eager")):
        assert isinstance(refusal(loss.backward), CompiledAutograd)


def test_compiled_autograd_is_left_alone_where_nothing_is_planned():
    model, _, x = made()
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(model, backend="memo_eager")(x).square().mean().backward()
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want)


STREAMS = torch.library.Library("streams", "FRAGMENT")  # where torch's own ops for streams are, which need a device
STREAMS.define("wait_for_test(Tensor x) -> Tensor")
STREAMS.impl("wait_for_test", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("streams::wait_for_test", torch.empty_like, lib=STREAMS)
torch.library.register_autograd("streams::wait_for_test", lambda ctx, gradient: gradient, lib=STREAMS)


def on_two_streams(x, w):
    y = torch.tanh(x @ w)
    z = torch.tanh(torch.ops.streams.wait_for_test(y) @ w)
    return torch.tanh(z @ w).square().mean()


def test_streams_of_the_user_are_left_alone_or_refused():
    x, w = torch.randn(2048, 64), torch.randn(64, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(on_two_streams(x, w), w)
    (got,) = torch.autograd.grad(torch.compile(on_two_streams, backend="memo_eager")(x, w), w)
    torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
    error = refusal(torch.compile(on_two_streams, backend="memo_eager", options={"memory_budget": "min"}), x, w)
    assert isinstance(error, UserStreams)
    assert "wait_for_test(y)" in str(error)
