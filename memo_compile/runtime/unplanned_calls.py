"""Calls of a graph of which nothing was planned over a range of lengths: what autograd keeps for them counts, too.

Private torch APIs, tried with torch 2.13: AOTAutograd keeps what its backward reads in `saved_tensors`;
`torch.utils._python_dispatch.is_traceable_wrapper_subclass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memo_compile.runtime.calls import saved_tensors_are_packed
from memo_compile.runtime.outstanding import Kept, ledger

Compiled = Callable[..., Any]


def counted(compiled: Compiled, graph: str, family: str, calls: int) -> Compiled:
    """`compiled`, each call of which is in the ledger until autograd drops what it keeps."""

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        if torch.is_grad_enabled() and not saved_tensors_are_packed():
            given = _storages(args)
            kept = [value for at, value in _storages(_saved(outputs)).items() if at not in given]
            _note(kept, graph, family, calls)
        return outputs

    return run


def _note(tensors: Sequence[torch.Tensor], graph: str, family: str, calls: int) -> None:
    sizes = [value.untyped_storage().nbytes() for value in tensors]
    if any(sizes):
        witness, size = tensors[sizes.index(max(sizes))], sum(sizes)
        ledger().note(witness, Kept(graph=graph, family=family, calls=calls, bytes=size, host_bytes=0, witness=0))


def _saved(outputs: Iterable[Any]) -> tuple[Any, ...]:
    """What the backward of the first output that has one keeps: all outputs have the same."""
    nodes = (value.grad_fn for value in outputs if isinstance(value, torch.Tensor) and value.grad_fn is not None)
    return tuple(getattr(next(nodes, None), "saved_tensors", None) or ())


def _storages(values: Iterable[Any]) -> dict[int, torch.Tensor]:
    """One tensor for each storage, by its address."""
    return {v.untyped_storage().data_ptr(): v for value in values for v in _plain(value)}


def _plain(value: Any) -> Iterator[torch.Tensor]:
    """A tensor, or those that a subclass (a DTensor, quantized weights) is made of."""
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(value, name))
    elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
        yield value
