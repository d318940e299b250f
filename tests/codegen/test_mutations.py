"""What was made of a buffer before an op writes to it is what it was."""

import pytest
import torch

from memo_compile.codegen import corrections

LIBRARY = torch.library.Library("test_mutations", "DEF")
LIBRARY.define("double_(Tensor(a!) x) -> ()")
LIBRARY.impl("double_", lambda x: (x.mul_(2.0), None)[1], "CompositeExplicitAutograd")
torch.library.register_fake("test_mutations::double_", lambda x: None, lib=LIBRARY)


def model(x, w):
    y = x @ w
    early = y.sin()
    torch.ops.test_mutations.double_(y)
    return y + early


def result(compiled):
    torch.manual_seed(0)
    x, w = torch.randn(64, 32).double().requires_grad_(), torch.randn(32, 32).double()
    return compiled(x, w)


def test_a_value_made_before_a_mutation_is_read_after_it():
    assert torch.allclose(result(torch.compile(model, backend="memo")), result(model), rtol=1e-12)


def test_it_would_be_made_of_what_the_op_has_written(monkeypatch):
    import contextlib

    monkeypatch.setattr(corrections, "readers_before_writers", contextlib.nullcontext)
    difference = (result(torch.compile(model, backend="memo")) - result(model)).abs().max()
    if difference < 1e-6:
        pytest.skip("this torch keeps the order by itself")
    assert difference > 0.1
