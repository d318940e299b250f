"""Kernels compile beside the graphs that follow, and are there when the compilation is done."""

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile

from memo_compile.codegen.kernels import kernels_beside


class Compiler(AsyncCompile):
    """One whose kernels are ready when they are waited for."""


def waiting(monkeypatch):
    waited = []
    monkeypatch.setattr(AsyncCompile, "wait", lambda self, scope: waited.append((self, scope)))
    return waited


def test_modules_are_waited_for_at_the_end(monkeypatch):
    waited = waiting(monkeypatch)
    first, second = (Compiler(), {"a": 1}), (Compiler(), {"b": 2})
    with kernels_beside():
        for compiler, scope in (first, second):
            compiler.wait(scope)
        assert waited == []
    assert waited == [first, second]


def test_after_an_error_nothing_is_waited_for_and_all_is_as_before(monkeypatch):
    waited = waiting(monkeypatch)
    original = AsyncCompile.wait
    with pytest.raises(ZeroDivisionError), kernels_beside():
        Compiler().wait({"kernels": 1 / 0})
    assert waited == []
    assert AsyncCompile.wait is original


def test_real_kernels_run():
    def fn(x):
        return torch.sin(x) + 1

    with kernels_beside():
        compiled = torch.compile(fn)
        # The module is loaded, and its kernels are put in place, before anything runs.
        entry = torch._dynamo.export(fn)(torch.ones(8)).graph_module
        code = torch._inductor.compile(entry, [torch.ones(8)])
    assert torch.equal(compiled(torch.ones(8)), fn(torch.ones(8)))
    assert torch.allclose(code(torch.ones(8))[0], fn(torch.ones(8)))
    torch._dynamo.reset()
