"""How many calls of one graph a step makes, as far as modules tell: blocks that are compiled alone run one graph.

Dynamo compiles the forward of a block once, and runs that for each block of the same class and sizes. All of their
calls wait for their backward at once, and the graph is planned before the second has been made.

Private torch APIs, tried with torch 2.13: `Module._compiled_call_impl`, by which a module knows that it was compiled,
and the `_orig_mod` of what `torch.compile` puts around one.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from torch import nn

from memo_compile.trace.frames import compiled_module, frame_module


def expected_calls() -> int:
    """The calls of the graph that is being compiled that a step makes, at least 1.

    The frame's module may be several times in the module that the user compiled (which fell into graphs), and the user
    may have compiled several such modules.
    """
    owner, module = compiled_module(), frame_module()
    if owner is None:
        return 1
    inside = 1 if module is None else sum(_alike(m, module) for m in owner.modules())
    return max(1, inside) * max(1, _compiled_like(owner))


def whole_model() -> nn.Module | None:
    """The outermost module around the one that is being compiled; None where the user compiled a function."""
    owner = compiled_module()
    return None if owner is None else _model_of(owner, _modules())


def _modules() -> list[nn.Module]:
    return [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]


def _compiled_like(owner: nn.Module) -> int:
    """Compiled modules like `owner` in the model that it is a part of. Another model's calls are another step's."""
    from torch._dynamo.eval_frame import OptimizedModule  # loads Dynamo

    modules = _modules()
    wrapped = {id(m._orig_mod) for m in modules if type(m) is OptimizedModule}
    return sum(
        1
        for m in _model_of(owner, modules).modules()
        if (id(m) in wrapped or m.__dict__.get("_compiled_call_impl") is not None) and _alike(m, owner)
    )


def _model_of(module: nn.Module, modules: Sequence[nn.Module]) -> nn.Module:
    """The outermost module around one."""
    parents = {id(child): m for m in modules for child in m.__dict__.get("_modules", {}).values() if child is not None}
    around, seen = module, {id(module)}
    while (parent := parents.get(id(around))) is not None and id(parent) not in seen:
        around = parent
        seen.add(id(around))
    return around


def _alike(a: nn.Module, b: nn.Module) -> bool:
    return a is b or (type(a) is type(b) and _sizes(a) == _sizes(b))


def _sizes(module: nn.Module) -> list[Any]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]
