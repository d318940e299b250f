"""Where slices land, read from the emitted backward: what a call before it needs to start them early.

A prefetch buffer that has a storage of its own can be taken before its backward begins. In the emitted text its segment
then comes from `memo::prefetch_buffer`, which hands over what is there already, and allocates it where nothing is.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

import torch

from memo_compile.codegen.emitted.text import PREFETCH, PREFETCH_BUFFER, call_in, statements_of
from memo_compile.codegen.emitted.views import View, read_view
from memo_compile.runtime.cross_call import EarlyPrefetch, Schedule


def _calls(lines: Sequence[str]) -> list[tuple[str | None, ast.Call]]:
    """Target and call of each statement that is one."""
    found: list[tuple[str | None, ast.Call]] = []
    for statement in statements_of(lines):
        call = call_in(statement)
        if call is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            found.append((target.id if isinstance(target, ast.Name) else None, call))
    return found


def _name(value: ast.expr) -> str | None:
    if isinstance(value, ast.Call) and value.args:
        value = value.args[0]
    return value.id if isinstance(value, ast.Name) else None


def prefetch_buffers_in(lines: Sequence[str]) -> dict[str, tuple[str, int]]:
    """For each buffer in which a slice lands: the name of the lease, and the slice's offset in it."""
    found: dict[str, tuple[str, int]] = {}
    for _, call in _calls(lines):
        if ast.unparse(call.func) == PREFETCH:
            buffer, lease = _name(call.args[0]), _name(call.args[1])
            if buffer is not None and lease is not None:
                found[buffer] = (lease, ast.literal_eval(call.args[2]))
    return found


def take_prefetch_buffer(segment: str, size: int, lease: str, offset: int, make: str) -> str:
    """The statement that takes a prefetch buffer; `make` is the allocation that it replaces, `empty_strided_DEVICE`."""
    kind = make.rsplit("_", 1)[1]
    where = f"torch.device('{kind}')" if kind == "cpu" else f"torch.device('{kind}', torch.{kind}.current_device())"
    return f"{segment} = {PREFETCH_BUFFER}({lease}, {offset}, {size}, {where})"


def prefetch_buffer_size(call: ast.expr) -> int | None:
    """The bytes that `take_prefetch_buffer`'s call asks for; None for any other expression."""
    if isinstance(call, ast.Call) and ast.unparse(call.func) == PREFETCH_BUFFER:
        return int(ast.literal_eval(call.args[2]))
    return None


def schedule_of(lines: Sequence[str]) -> Schedule:
    """What an emitted backward prefetches, as if all of its prefetch buffers could be taken before it begins.

    Of a slice that comes back several times the first may be early.
    """
    taken: dict[str, int] = {}
    views: dict[str, View] = {}
    prefetch_buffers: list[EarlyPrefetch] = []
    begun = set[int]()
    count = 0
    for target, call in _calls(lines):
        size = prefetch_buffer_size(call)
        if size is not None and target is not None:
            taken[target] = size
        elif target is not None and (view := read_view(call, {})) is not None:
            views[target] = view
        elif ast.unparse(call.func) == PREFETCH:
            count += 1
            buffer, offset = _name(call.args[0]), ast.literal_eval(call.args[2])
            first = offset not in begun
            begun.add(offset)
            if first and buffer is not None and buffer in views and views[buffer].segment in taken:
                view = views[buffer]
                shape, stride, start, place = view.shape, view.stride, 0, call.args[0]
                if isinstance(place, ast.Call):  # reinterpret_tensor(buffer, shape, stride, start)
                    shape, stride, start = (ast.literal_eval(a) for a in place.args[1:4])
                dtype = getattr(torch, view.dtype.rsplit(".", 1)[1])
                prefetch_buffers.append(
                    EarlyPrefetch(
                        buffer=buffer,
                        offset=offset,
                        nbytes=taken[view.segment],
                        dtype=dtype,
                        shape=tuple(shape),
                        stride=tuple(stride),
                        start=start,
                    )
                )
    return Schedule(tuple(prefetch_buffers), count)


def how_many_early(sizes: Sequence[tuple[int, int]], held: Sequence[int], forward_steps: int, cap: int) -> int:
    """How many prefetch buffers may be taken before their backward begins, so that it still holds at most `cap` bytes.

    Args:
        sizes: (first step, bytes) of each prefetch buffer, in the order in which they are taken.
        held: bytes held at each step of the timeline when they are taken where the code takes them.

    >>> how_many_early([(2, 10), (3, 10)], [0, 30, 10, 20], 1, 40)
    1
    """
    extra = [0] * len(held)
    for number, (start, size) in enumerate(sizes):
        for step in range(forward_steps, min(start, len(held))):
            extra[step] += size
        if max((h + e for h, e in zip(held, extra, strict=True)), default=0) > cap:
            return number
    return len(sizes)
