"""The scratch of a kernel without a formula: one call at its shapes, strides and types, on its device.

Only torch's own ops are called for this: an op of somebody else's may count its calls, or wait for other ranks. What
these take is seen in the first step (`memo_compile.workspaces.seen`). Operands are ones, identities where they are
square (which can be inverted and decomposed), and zeros where they are integers (which index anything).

The answer is kept by op, operands and number of threads for as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import unset_fake_temporarily  # private parts of torch, as the next
from torch.utils._python_dispatch import _disable_current_modes

from memo_compile.logs import logger
from memo_compile.workspaces.recording import can_record, recorded

log = logger(__name__)
_CPU = torch.device("cpu")


class _Unknown(Exception):
    """An operand that nobody can make from its description, or a call that cannot be measured now."""


@dataclass(frozen=True)
class _Operand:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Call:
    """An op, and its arguments as they can be compared: tensors as `_Operand`, lists as tuples."""

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    threads: int


def by_call(node: fx.Node) -> int | None:
    """The bytes that one measured call takes beyond its results; None where it cannot be measured."""
    try:
        args = tuple(_described(a) for a in node.args)
        kwargs = tuple((key, _described(value)) for key, value in node.kwargs.items())
        return _measured(_Call(node.target, args, kwargs, torch.get_num_threads()))
    except _Unknown as unknown:
        log.debug("%s: its scratch is not measured: %s", node.target, unknown)
        return None


def taken_by(op: Any, operands: Sequence[torch.Tensor], *rest: Any) -> int | None:
    """The bytes that a call on the CPU takes beyond its results; None where it cannot be measured.

    Args:
        operands: values that lie as those of the call; their numbers are not read.
        rest: the arguments after them.
    """
    made = (_Operand(tuple(map(int, v.shape)), tuple(map(int, v.stride())), v.dtype, _CPU) for v in operands)
    try:
        return _measured(_Call(op, (*made, *rest), (), torch.get_num_threads()))
    except _Unknown as unknown:
        log.debug("%s: its scratch is not measured: %s", op, unknown)
        return None


def _described(value: Any) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            raise _Unknown(f"an operand of layout {value.layout} on {value.device}")
        shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        return _Operand(shape, stride, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(_described(v) for v in value)
    if isinstance(value, torch.SymInt):
        return int(value)
    plain = (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
    if value is None or isinstance(value, plain):
        return value
    raise _Unknown(f"an operand of type {type(value).__name__}")


@lru_cache(maxsize=4096)
def _measured(call: _Call) -> int | None:
    if not can_record():
        raise _Unknown("a profiler is running")  # which is not kept
    with _as_in_a_step():
        try:
            return _taken(call)
        except Exception as error:  # whatever the op says to such operands
            log.debug("%s: its scratch is not measured: %s", call.op, error)
            return None


def _taken(call: _Call) -> int:
    operands = [*call.args, *(v for _, v in call.kwargs)]
    device = next(iter(_devices(operands)), torch.device("cpu"))
    args, kwargs = _made(call.args), {key: _made(value) for key, value in call.kwargs}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":  # libraries take what stays theirs in a first call
            call.op(*args, **kwargs)
        _, record = recorded(lambda: call.op(*args, **kwargs), device=device.type)
    return record.peak - record.held


@contextmanager
def _as_in_a_step() -> Iterator[None]:
    """Real tensors, without the modes of the trace that this may run within; no gradients, as in a planned step."""
    with ExitStack() as stack:
        for context in (unset_fake_temporarily(), _disable_current_modes(), torch.no_grad()):
            stack.enter_context(context)
        yield


def _devices(values: Any) -> Iterator[torch.device]:
    for value in values:
        if isinstance(value, _Operand):
            yield value.device
        elif isinstance(value, tuple):
            yield from _devices(value)


def _made(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_made(v) for v in value]
    return _filled(value) if isinstance(value, _Operand) else value


def _filled(operand: _Operand) -> torch.Tensor:
    last = sum((size - 1) * step for size, step in zip(operand.shape, operand.stride, strict=True))
    elements = 0 if 0 in operand.shape else last + 1
    whole = torch.zeros(elements, dtype=operand.dtype, device=operand.device)
    tensor = whole.as_strided(operand.shape, operand.stride)
    if not (operand.dtype.is_floating_point or operand.dtype.is_complex):
        return tensor
    square = len(operand.shape) >= 2 and operand.shape[-1] == operand.shape[-2] and operand.stride[-1] > 0
    if square and 0 not in operand.stride:
        tensor.diagonal(dim1=-2, dim2=-1).fill_(1)
    else:
        whole.fill_(1)
    return tensor
