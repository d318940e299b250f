"""Lets kernels compile beside the graphs that follow, several C++ kernels together.

A module that Inductor emits waits for its C++ or Triton kernels when it is imported. The forward's wait would leave all
but the compiler's processes idle, with the backward still to be lowered.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `AsyncCompile.wait(scope)`, the last statement of an emitted
module, which replaces futures among its globals; `AsyncCompile.cpp_pybinding`, which makes a kernel of a text; `submit`
and `get_compile_threads`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from memo_compile.codegen.kernel_units import Kernel, Unit, compiled_alone, in_units

Load = Callable[[], Callable[..., Any]]


@dataclass(frozen=True)
class Awaited:
    """A kernel that is not compiled yet. It stands in a module's globals; what calls it there waits."""

    kernel: Kernel
    loads: Mapping[Kernel, Load] = field(repr=False)

    def result(self) -> Callable[..., Any]:
        """The kernel, which was started when its module was imported whole."""
        return self.loads[self.kernel]()

    def __call__(self, *args: Any) -> Any:
        """Run the kernel."""
        return self.result()(*args)


@dataclass(frozen=True)
class _Kernels:
    """The C++ kernels of one compilation, each once: those that wait to be started, and what loads the others."""

    waiting: dict[Kernel, None] = field(default_factory=dict)
    loads: dict[Kernel, Load] = field(default_factory=dict)

    def add(self, _: Any, argtypes: list[str], source: str) -> Awaited:
        """A kernel of an emitted module; called in place of `AsyncCompile.cpp_pybinding`."""
        kernel = Kernel(tuple(argtypes), source)
        if kernel not in self.loads:
            self.waiting[kernel] = None
        return Awaited(kernel, self.loads)

    def start(self, compiler: Any) -> None:
        """Compile what was added, with the settings of Inductor that hold now."""
        from torch._inductor.async_compile import get_compile_threads  # loads Inductor

        threads = get_compile_threads()
        submit = compiler.submit if threads > 1 else None
        for some in in_units(list(self.waiting), threads):
            if len(some) == 1:
                self.loads[some[0]] = compiled_alone(some[0], submit)
                continue
            unit = Unit(some, submit)
            self.loads.update({kernel: partial(unit.kernel, i) for i, kernel in enumerate(some)})
        self.waiting.clear()


@contextlib.contextmanager
def kernels_beside(waited: Callable[[], None] | None = None) -> Iterator[None]:
    """Within, emitted modules are loaded without waiting for their kernels; all are there when it ends.

    Args:
        waited: is called before the kernels are waited for.
    """
    from torch._inductor import async_compile  # loads Inductor

    compilers: Any = async_compile.AsyncCompile
    waiting: list[tuple[Any, dict[str, Any]]] = []
    kernels = _Kernels()
    original, make = compilers.wait, compilers.cpp_pybinding

    def later(self: Any, scope: dict[str, Any]) -> None:
        kernels.start(self)
        waiting.append((self, scope))

    compilers.wait, compilers.cpp_pybinding = later, lambda *args: kernels.add(*args)
    try:
        yield
    finally:
        compilers.wait, compilers.cpp_pybinding = original, make
    if waiting and waited is not None:
        waited()
    for compiler, scope in waiting:
        scope.update({name: value.result() for name, value in scope.items() if isinstance(value, Awaited)})
        compiler.wait(scope)
