"""C++ kernels share translation units, and are the same kernels."""

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache

from memo_compile.codegen.kernel_units import FEWEST, MOST, Kernel, Unit, in_units
from memo_compile.codegen.kernels import Awaited, kernels_beside

HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>"


def adding(value, header=HEADER):
    """A kernel as Inductor writes them."""
    source = f"""
{header}
static inline float more(float x) {{ return x + {value}; }}
extern "C"  void  kernel(const float* in_ptr0,
                       float* out_ptr0)
{{
    for (int64_t i = 0; i < 4; ++i) out_ptr0[i] = more(in_ptr0[i]);
}}
"""
    return Kernel(("const float*", "float*"), source)


def test_what_defines_one_kernel_and_needs_the_shared_header_alone_is_joined():
    assert adding(1).joinable
    assert not adding(1, HEADER + "\n#include <cstdio>").joinable
    assert not Kernel((), adding(1).source * 2).joinable
    assert not Kernel((), f"{HEADER}\nvoid other() {{}}").joinable


def test_fewer_stand_in_a_unit_where_many_are_compiled_at_once():
    kernels = [adding(i) for i in range(MOST + 1)]
    assert [len(unit) for unit in in_units(kernels, 1)] == [MOST, 1]
    assert {len(unit) for unit in in_units(kernels[:MOST], 64)} == {FEWEST}


def test_each_kernel_of_a_unit_is_its_own_though_they_share_names():
    unit = Unit([adding(10), adding(20)], None)
    x, out = torch.arange(4.0), torch.empty(4)
    for i, value in enumerate((10, 20)):
        unit.kernel(i)(x, out)
        assert torch.equal(out, x + value)
    with pytest.raises(RuntimeError, match="requires 2 args"):
        unit.kernel(1)(x)


def test_kernels_that_do_not_compile_together_are_compiled_alone(monkeypatch):
    monkeypatch.setattr("memo_compile.codegen.kernel_units.unit_of", lambda kernels: f"{HEADER}\nno C++")
    x, out = torch.arange(4.0), torch.empty(4)
    Unit([adding(10), adding(20)], None).kernel(1)(x, out)
    assert torch.equal(out, x + 20)


def test_a_kernel_that_nobody_put_in_place_waits_when_it_is_called():
    kernel, loads = adding(1), {}
    waited = Awaited(kernel, loads)
    loads[kernel] = lambda: max
    assert waited(1, 2) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_modules_get_their_kernels_from_few_libraries(monkeypatch, threads):
    """Those of two modules that are equal are compiled once."""
    loaded = []
    load = CppPythonBindingsCodeCache.load_async.__func__
    monkeypatch.setattr(
        CppPythonBindingsCodeCache,
        "load_async",
        classmethod(lambda cls, code, *a, **k: loaded.append(code) or load(cls, code, *a, **k)),
    )
    monkeypatch.setattr("torch._inductor.async_compile.get_compile_threads", lambda: threads)
    kernels, scopes = {"k0": adding(threads), "k1": adding(threads + 1)}, []
    with kernels_beside():
        for _ in range(2):
            compiler = AsyncCompile()
            made = {name: compiler.cpp_pybinding(list(k.argtypes), k.source) for name, k in kernels.items()}
            scopes.append(made)
            compiler.wait(made)
    assert len(loaded) == 1
    x, out = torch.arange(4.0), torch.empty(4)
    for scope in scopes:
        scope["k1"](x, out)
        assert torch.equal(out, x + threads + 1)
    assert scopes[0]["k0"] is scopes[1]["k0"]
    assert not isinstance(scopes[0]["k0"], Awaited)
