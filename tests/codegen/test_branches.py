"""Branches of `cond` are given what they were compiled for, whatever layout Inductor has chosen since."""

import contextlib

import pytest
import torch

import memo_compile
from memo_compile.codegen import corrections

TOKENS, WIDTH = 128, 32


class Normed(torch.nn.Module):
    """A branch behind a norm over channels, which Inductor leaves as it is made: channel by channel."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.positions = torch.nn.Embedding(TOKENS, WIDTH)

    def forward(self, x, flag):
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = torch.cond(flag > 0, lambda x: x + self.positions.weight, lambda x: 2 * x.sin(), (x,))
        return x.square().mean()


def gradients(flag, **keywords):
    torch.manual_seed(0)
    torch._dynamo.reset()
    memo_compile.reset()
    model = Normed().double()
    x = torch.randn(1, TOKENS, WIDTH).double().requires_grad_()
    (torch.compile(model, **keywords) if keywords else model)(x, torch.tensor(flag)).backward()
    return [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


@pytest.mark.parametrize("flag", [1.0, -1.0])
def test_both_branches_are_right_where_their_operand_is_not_saved_as_it_is(flag):
    got = gradients(flag, backend="memo", options={"memory_budget": 0.4})
    for mine, eager in zip(got, gradients(flag), strict=True):
        assert torch.allclose(mine, eager, rtol=1e-9, atol=1e-12)


def test_without_that_a_branch_would_refuse_its_operand(monkeypatch):
    monkeypatch.setattr(corrections, "branches_given_as_traced", contextlib.nullcontext)
    with pytest.raises(AssertionError, match="stride"):
        gradients(1.0, backend="memo", options={"memory_budget": 0.4})
