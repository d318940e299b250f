"""Gradients of models that nobody chose, two steps each, with copies that are held up."""

import random

import pytest
import torch
import zoo
from random_models import model_of, options_of

import memo_compile
from memo_compile.runtime.ops import engine

CPU = torch.device("cpu")


def steps(model, fn, inputs):
    """Loss and gradients of two steps from one seed, and the buffers behind them; buffers are as before afterwards."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(7)
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = fn(*inputs)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({**gradients, "the loss": loss.detach().clone()})
    found.append({name: b.clone() for name, b in model.named_buffers()})
    for name, b in model.named_buffers():
        b.copy_(before[name])
    return found


def planned(model, inputs, backend, options):
    """At the budget, or at the least that the refusal names where it cannot be kept."""
    try:
        return steps(model, torch.compile(model, backend=backend, options=options), inputs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if options["memory_budget"] == "min" or not isinstance(error.inner_exception, memo_compile.BudgetTooSmall):
            raise
        torch._dynamo.reset()
        least = {**options, "memory_budget": error.inner_exception.least}
        return steps(model, torch.compile(model, backend=backend, options=least), inputs)


def check(seed, backend):
    model, inputs = model_of(seed)
    options, slowest = options_of(seed)
    unplanned = "inductor" if backend == "memo" else "aot_eager"  # dropout draws other numbers in eager
    reference = torch.compile(model, backend=unplanned) if model.dropout else model
    expected = steps(model, reference, inputs)
    torch._dynamo.reset()
    draw = random.Random(seed)
    with engine(CPU).delays(lambda way: slowest * draw.random()):
        got = planned(model, inputs, backend, options)
    for mine, theirs in zip(got, expected, strict=True):
        zoo.assert_close(mine, theirs)


@pytest.mark.parametrize("seed", range(6))
def test_op_by_op(seed):
    check(seed, "memo_eager")


@pytest.mark.parametrize("seed", range(100, 102))
def test_compiled(seed):
    check(seed, "memo")


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(102, 116))
def test_compiled_more(seed):
    check(seed, "memo")
