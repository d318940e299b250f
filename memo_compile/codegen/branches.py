"""The branches of `torch.cond` are given values that lie as they did when traced.

Inductor compiles a branch for operands with the strides of the trace, and hands it whatever layout it has chosen since
(torch/_inductor/ir.py, `Conditional.create`; loops and nested regions are given what they were traced with). Without a
plan most operands are saved, and so keep their strides; the rows of one that is offloaded are copied out of any layout.

Private torch APIs, tried with torch 2.13: `torch._inductor.ir.Conditional.create` and
`ExternKernel.realize_input`, `require_exact_strides`; `V.graph.current_node`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx


@contextlib.contextmanager
def branches_given_as_traced() -> Iterator[None]:
    """Within, the operands of `cond` have the strides of the trace."""
    from torch._inductor import ir  # loads Inductor
    from torch._inductor.virtualized import V

    conditional: Any = ir.Conditional
    original = conditional.__dict__["create"]

    def create(cls: Any, predicate: Any, true_fn: Any, false_fn: Any, operands: Sequence[Any]) -> Any:
        graph: Any = V.graph
        given = [_as_traced(x, node) for x, node in zip(operands, graph.current_node.args[-1], strict=True)]
        return original.__get__(None, cls)(predicate, true_fn, false_fn, given)

    conditional.create = classmethod(create)
    try:
        yield
    finally:
        conditional.create = original


def _as_traced(operand: Any, node: Any) -> Any:
    from torch._inductor import ir  # loads Inductor

    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):  # a number
        return operand
    kernel: Any = ir.ExternKernel
    return kernel.require_exact_strides(kernel.realize_input(operand), value.stride())
