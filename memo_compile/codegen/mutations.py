"""Nothing is written over that is still read: two things that Inductor does not see to.

Values that were made of a buffer before an op writes to it are computed before it does.
Inductor lowers elementwise ops to formulas, which are computed where they are read. It computes those that read a
buffer when an op that mutates it is lowered, but puts them after that op (torch/_inductor/ir.py, `FallbackKernel`:
the op is registered first, then come its `MutationOutput`s): they read what the op has written.

And no kernel writes its result over what a region or an op that memo does not know may still hold.

Private torch APIs, tried with torch 2.11 (on CUDA) and 2.13: `torch._inductor.ir.FallbackKernel.create`, values'
`realize` and `get_name`, `V.graph.mark_buffer_mutated`, and `PythonWrapperCodegen.can_reuse`, which is asked with the
kernel that would take a buffer's place, or alone before a buffer is freed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree

from memo_compile.codegen.scheduler.dependencies import held_buffers


@contextlib.contextmanager
def readers_before_writers() -> Iterator[None]:
    """Within, whatever was made of a buffer is computed before an op that mutates it."""
    from torch._inductor import ir  # loads Inductor

    kernel: Any = ir.FallbackKernel
    original = kernel.__dict__["create"]

    def create(cls: Any, op: Any, *args: Any, **keywords: Any) -> Any:
        for value in _mutated(op, args, keywords):
            _compute_readers(value)
        return original.__get__(None, cls)(op, *args, **keywords)

    kernel.create = classmethod(create)
    try:
        yield
    finally:
        kernel.create = original


@contextlib.contextmanager
def in_place_where_known() -> Iterator[None]:
    """Within, no kernel takes over the place of an operand that a region or a custom op was given, or has made.

    Inductor does where the kernel is its last reader by name; but a result may be an operand, which it does not know.
    """
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen  # loads Inductor
    from torch._inductor.virtualized import V

    wrapper: Any = PythonWrapperCodegen
    original = wrapper.can_reuse
    held: WeakKeyDictionary[Any, frozenset[str]] = WeakKeyDictionary()

    def can_reuse(self: Any, buffer: Any, taker: Any = None) -> bool:
        graph: Any = V.graph
        if taker is not None and graph not in held:
            held[graph] = held_buffers(graph)
        return not (taker is not None and buffer.get_name() in held[graph]) and original(self, buffer, taker)

    wrapper.can_reuse = can_reuse
    try:
        yield
    finally:
        wrapper.can_reuse = original


def _mutated(op: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    """The lowered values that an op writes to, by its schema."""
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
        return []
    arguments = op._schema.arguments
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | keywords
    written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return pytree.tree_leaves(written)


def _compute_readers(value: Any) -> None:
    from torch._inductor import ir  # loads Inductor
    from torch._inductor.virtualized import V

    if isinstance(value, (ir.TensorBox, ir.StorageBox, ir.BaseView, ir.Buffer)):
        graph: Any = V.graph
        value.realize()
        graph.mark_buffer_mutated(value.get_name())
