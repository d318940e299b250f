"""Lets kernels compile beside the graphs that follow.

A module that Inductor emits waits for its C++ or Triton kernels when it is imported. The forward's wait would leave all
but the compiler's processes idle, with the backward still to be lowered.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `AsyncCompile.wait(scope)`, the last statement of an emitted
module, which replaces futures among its globals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def kernels_beside() -> Iterator[None]:
    """Within, emitted modules are loaded without waiting for their kernels; all are there when it ends."""
    from torch._inductor import async_compile  # loads Inductor

    compilers: Any = async_compile.AsyncCompile
    waiting: list[tuple[Any, dict[str, Any]]] = []
    original = compilers.wait

    def later(self: Any, scope: dict[str, Any]) -> None:
        waiting.append((self, scope))

    compilers.wait = later
    try:
        yield
    finally:
        compilers.wait = original
    for compiler, scope in waiting:
        compiler.wait(scope)
