"""Seconds of each line of an emitted body, from the shapes that it names: the roofline of `passes.analysis.costs`.

Matmuls and attention are bound by arithmetic, a fused kernel by the bytes of all that it names.

Private torch APIs, tried with torch 2.11 (on CUDA) and 2.13: of `V.graph` `try_get_buffer`; of buffers `get_size`,
`get_dtype`, `get_origin_node` and `fx_node`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.codegen.emitted.text import TransferOp, statements_of
from memo_compile.hardware.profiles import DeviceProfile
from memo_compile.passes.analysis.costs import node_cost, node_flops

_FREE = ("empty_strided_", "reinterpret_tensor", "alloc_from_pool", "assert_", "get_raw_stream", "torch.cuda.")
_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mm_into_", "addmm_into_"})
_COPIES = frozenset({*TransferOp, "host_lease"})


def line_seconds(lines: Sequence[str], profile: DeviceProfile) -> list[float]:
    """What each line computes, in seconds; nothing for lines that only name, allocate, free, or move slices.

    To be called while Inductor has the graph at hand.
    """
    return [_seconds(text, profile) for text in lines]


def element_bytes(names: Sequence[str]) -> dict[str, int]:
    """Bytes of an element of each buffer or input that Inductor's graph knows."""
    found = {name: _known(name) for name in names}
    return {name: dtype.itemsize for name, (_, dtype) in found.items() if dtype is not None}


def _seconds(text: str, profile: DeviceProfile) -> float:
    if text.lstrip().startswith(("#", "with ", "del ")):
        return 0.0
    try:
        statements: list[Any] = [*statements_of([text])]
    except SyntaxError:
        return 0.0
    calls = [(s, s.value) for s in statements if isinstance(getattr(s, "value", None), ast.Call)]
    return sum((_of_call(statement, call, profile) for statement, call in calls), 0.0)


def _of_call(statement: Any, call: ast.Call, profile: DeviceProfile) -> float:
    function = ast.unparse(call.func)
    op = function.removesuffix(".default").rsplit(".", 1)[-1]
    if function.startswith(_FREE) or op in _COPIES:
        return 0.0
    if op in _MATMULS:
        return _of_matmul(call, op, profile)
    node = _node_of(statement)
    if node is not None and node_flops(node):
        return node_cost(node, profile).seconds
    return _traffic(call, profile)


def _traffic(call: ast.Call, profile: DeviceProfile) -> float:
    named = {n.id for a in (*call.args, *call.keywords) for n in ast.walk(a) if isinstance(n, ast.Name)}
    moved = 0
    for name in named:
        shape, dtype = _known(name)
        moved += math.prod(shape) * dtype.itemsize if dtype is not None else 0
    return moved / (profile.memory_bandwidth * profile.memory_efficiency) + profile.launch_overhead


def _of_matmul(call: ast.Call, op: str, profile: DeviceProfile) -> float:
    into = op.endswith("into_")
    operands = [_shape(a) for a in call.args]
    left, right = operands[-2:] if not into else operands[2 if op.startswith("add") else 1 :][:2]
    if len(left) < 2 or not right:
        return _traffic(call, profile)
    flops = 2.0 * math.prod(left) * right[-1]
    rate = profile.flops(_dtype(call.args)) * profile.matmul_share(flops, min(*left[-2:], right[-1]))
    return max(flops / rate, _traffic(call, profile) - profile.launch_overhead) + profile.launch_overhead


def _shape(value: ast.expr) -> tuple[int, ...]:
    """The shape that an operand has where it is read; () where the text does not tell."""
    if isinstance(value, ast.Name):
        return _known(value.id)[0]
    if isinstance(value, ast.Call) and len(value.args) > 1 and ast.unparse(value.func) == "reinterpret_tensor":
        return tuple(int(s) for s in ast.literal_eval(value.args[1]))
    return ()


def _dtype(values: Sequence[ast.expr]) -> str:
    for name in (n.id for v in values for n in ast.walk(v) if isinstance(n, ast.Name)):
        dtype = _known(name)[1]
        if dtype is not None and dtype.is_floating_point:
            return str(dtype).removeprefix("torch.")
    return "float32"


def _known(name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Shape and dtype of a buffer or an input of the graph at hand; nothing for any other name."""
    from torch._inductor.virtualized import V  # loads Inductor

    buffer: Any = V.graph.try_get_buffer(name)
    try:
        return tuple(int(s) for s in buffer.get_size()), buffer.get_dtype()
    except (AttributeError, NotImplementedError, TypeError):
        return (), None


def _node_of(statement: Any) -> fx.Node | None:
    """The FX node that a call computes, where what it makes has one of its own."""
    from torch._inductor.virtualized import V  # loads Inductor

    names = [t.id for t in getattr(statement, "targets", ()) if isinstance(t, ast.Name)]
    names += [k.value.id for k in statement.value.keywords if k.arg == "out" and isinstance(k.value, ast.Name)]
    for name in names:
        buffer = V.graph.name_to_buffer.get(name)
        node = getattr(buffer, "fx_node", None) or (buffer.get_origin_node() if buffer is not None else None)
        if isinstance(node, fx.Node) and "val" in node.meta:
            return node
    return None
