"""What no text says: regions, branches, loops and custom ops whose results may be what they were given.

Everything in float64 against eager, compiled, with nothing planned away and with the least that there is.
"""

import pytest
import torch
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

LIBRARY = torch.library.Library("test_lifetimes", "DEF")
LIBRARY.define("doubled_(Tensor(a!) x) -> ()")
LIBRARY.impl("doubled_", lambda x: (x.mul_(2.0), None)[1], "CompositeExplicitAutograd")
torch.library.register_fake("test_lifetimes::doubled_", lambda x: None, lib=LIBRARY)
# What its schema denies: the result is the operand.
LIBRARY.define("same(Tensor x) -> Tensor")
LIBRARY.impl("same", lambda x: x, "CompositeExplicitAutograd")
torch.library.register_fake("test_lifetimes::same", torch.empty_like, lib=LIBRARY)


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ops.test_lifetimes.same(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.ops.test_lifetimes.same(gradient)


@torch.compiler.nested_compile_region
def region(x, w):
    return (torch.nn.functional.gelu(x @ w) @ w).sin() * x


@torch.compiler.nested_compile_region
def mutating_region(x, w):
    y = x @ w
    z = y.detach().clone()
    torch.ops.test_lifetimes.doubled_(z)
    return y.sin() + z


def regions(x, w):
    for _ in range(2):
        y = torch.cos(x) * torch.sigmoid(x)
        x = y + region(y.exp(), w).tanh()
    return x


def mutating_regions(x, w):
    return mutating_region(mutating_region(x, w), w)


def custom_ops(x, w):
    for _ in range(2):
        y = torch.tanh(x @ w)
        z = Same.apply(y)
        x = (z + 1.0).sin() @ w + y.cos()
    return x


def branches(x, w):
    y = torch.tanh(x @ w)
    z = torch.cond(y.sum() > 0, lambda y: y.sin(), lambda y: y.clone(), (y,))
    return (z + 1.0) * torch.tanh(y @ w)


def loops(x, w):
    y = torch.tanh(x @ w)
    _, z = while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, z.sin() * 1.1), (torch.tensor(0), y))
    return (z + 1.0) * torch.tanh(y @ w)


def scanned(x, w):
    """Inductor lowers no scan that gradients pass through, and none in float64."""
    y = torch.tanh(x @ w)

    def step(carried, row):
        carried = torch.tanh(carried * 0.5 + row)
        return carried.clone(), carried.sin()

    last, z = scan(step, torch.zeros_like(y[0]).detach(), y.detach(), dim=0)
    return (z + 1.0) * torch.tanh(y @ w) + last


def flexible_attention(x, w):
    """On the CPU without gradients of its own, and in float32."""
    q = torch.tanh((x @ w).detach().view(1, 64, 2, 16).transpose(1, 2)).clone(memory_format=torch.contiguous_format)
    z = flex_attention(q, q * 0.5, q.sin()).transpose(1, 2).reshape(64, 32)
    return (z + 1.0) * torch.tanh(x @ w) + z.cos() @ w


def trained(fn, dtype=torch.float64):
    torch.manual_seed(0)
    x, w = torch.randn(64, 32).to(dtype).requires_grad_(), (torch.randn(32, 32).to(dtype) * 0.2).requires_grad_()
    result = fn(x, w)
    return result.detach(), *torch.autograd.grad(result.square().mean(), (x, w))


@pytest.mark.filterwarnings("ignore:.*this custom operator")  # torch warns of results that are operands, and goes on
@pytest.mark.parametrize("model", [regions, mutating_regions, custom_ops, branches, loops])
def test_gradients_are_those_of_eager(model):
    expected = trained(model)
    for options in (None, {"memory_budget": "min"}):
        torch._dynamo.reset()
        got = trained(torch.compile(model, backend="memo", options=options))
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("model", [scanned, flexible_attention])
@torch._dynamo.config.patch(capture_scalar_outputs=True)  # Inductor's loop for a scan reads where it is
def test_what_torch_has_in_float32_alone(model):
    expected = trained(model, torch.float32)
    torch._dynamo.reset()
    got = trained(torch.compile(model, backend="memo", options={"memory_budget": "min"}), torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
