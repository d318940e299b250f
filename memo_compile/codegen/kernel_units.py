"""Several C++ kernels in one translation unit: two thirds of a small kernel's seconds are its header and its linking.

Each kernel is a namespace of its own, with the Python bindings that Inductor writes for it, and is imported as a module
of its own from the one library.

Private torch APIs, tried with torch 2.13: of `torch._inductor.codecache.CppPythonBindingsCodeCache` the template of the
bindings, the names in it, `load_async` and what it raises, `CppCompileError`; that emitted kernels are called `kernel`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from memo_compile.logs import logger

log = logger(__name__)

FEWEST, MOST = 4, 32  # kernels in a unit: fewer where many are compiled at once
_INCLUDE = re.compile(r"^\s*#include .*$", re.MULTILINE)
_KERNEL = re.compile(r"^extern \"C\"[^\n]*\bkernel\(", re.MULTILINE)
_NAME = "kernel"


@dataclass(frozen=True)
class Kernel:
    """What Inductor hands to be compiled: the C++ types of the arguments, and a source that has `kernel` in it."""

    argtypes: tuple[str, ...]
    source: str

    @property
    def joinable(self) -> bool:
        """Whether it may stand beside others: it defines one function, and needs the shared header alone."""
        includes = _INCLUDE.findall(self.source)
        defined = [m.group().startswith('extern "C"') for m in _KERNEL.finditer(self.source)]
        return defined == [True] and len(includes) == 1 and "cpp_prefix.h" in includes[0]


def in_units(kernels: Sequence[Kernel], threads: int) -> list[list[Kernel]]:
    """Which kernels are compiled together where `threads` units are compiled at once."""
    most = max(FEWEST, MOST // max(threads, 1))
    joinable = [k for k in kernels if k.joinable]
    together = [joinable[first : first + most] for first in range(0, len(joinable), most)]
    return [*together, *([k] for k in kernels if not k.joinable)]


def unit_of(kernels: Sequence[Kernel]) -> str:
    """The C++ source of one translation unit."""
    (header,) = {include for k in kernels for include in _INCLUDE.findall(k.source)}
    bindings = [_bindings(k, _numbered(i)) for i, k in enumerate(kernels)]
    lines = [header, "#define PY_SSIZE_T_CLEAN", *dict.fromkeys(_INCLUDE.findall(bindings[0]))]
    for i, (kernel, binding) in enumerate(zip(kernels, bindings, strict=True)):
        name = _numbered(i)
        lines += [f"namespace memo_{name} {{", f"#define {_NAME} {name}"]
        lines += [_INCLUDE.sub("", kernel.source), _INCLUDE.sub("", binding), f"#undef {_NAME}", "}"]
    return "\n".join(lines)


class Unit:
    """A translation unit that is being compiled."""

    def __init__(self, kernels: Sequence[Kernel], submit: Callable[..., Any] | None) -> None:
        self._kernels, self._submit = kernels, submit
        self._load: Callable[[], Any] = _bindings_cache().load_async(unit_of(kernels), submit_fn=submit)

    def kernel(self, i: int) -> Callable[..., Any]:
        """The `i`-th kernel, once it is compiled."""
        return self._functions[i]

    @cached_property
    def _functions(self) -> list[Callable[..., Any]]:
        from torch._inductor.exc import CppCompileError  # loads Inductor

        try:
            library = self._load()
        except CppCompileError as error:
            log.warning("kernels are compiled one by one, since they do not compile together: %s", error)
            return [compiled_alone(kernel, None)() for kernel in self._kernels]
        return [getattr(_module(library, _numbered(i)), _numbered(i)) for i in range(len(self._kernels))]


def compiled_alone(kernel: Kernel, submit: Callable[..., Any] | None) -> Callable[[], Callable[..., Any]]:
    """Starts to compile one kernel, as Inductor does; the result waits for it."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache  # loads Inductor

    bindings: Any = CppPythonBindingsCodeCache
    load: Callable[[], Callable[..., Any]] = bindings.load_pybinding_async(
        list(kernel.argtypes), kernel.source, submit_fn=submit
    )
    return load


@cache
def _bindings_cache() -> Any:
    from torch._inductor.codecache import CppPythonBindingsCodeCache  # loads Inductor

    base: Any = CppPythonBindingsCodeCache

    class FirstOfUnit(base):
        entry_function = _numbered(0)

    return FirstOfUnit


def _numbered(i: int) -> str:
    return f"{_NAME}_{i}"


def _bindings(kernel: Kernel, name: str) -> str:
    """What Inductor appends to a kernel that has this name; calls stay of `kernel`, which a macro replaces."""
    bindings = _bindings_cache()
    types = (argtype.replace("const ", "") for argtype in kernel.argtypes)
    arguments = ", ".join(f"parse_arg<{argtype}>(args, {n})" for n, argtype in enumerate(types))
    text: str = bindings.suffix_template.format(
        arg_len=len(kernel.argtypes),
        call_entry_func=bindings.call_entry_function.format(arguments),
        entry_func=name,
        extra_parse_arg="",
    )
    return text


def _module(library: Any, name: str) -> Any:
    """A kernel's module in a library whose first is loaded."""
    full = f"{library.key}.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, library.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]
