"""What Inductor knows of a graph that its emitted text does not say: who keeps a buffer, and which results are views.

A region's results may be what it was given, by Inductor's own lowering of it: an op that does nothing there is lowered
to nothing. What a custom op or a region keeps, or whether it returns what it was given, no schema tells. A collective
that is not waited for in the graph reads on when it has ended.

Private torch APIs, tried with torch 2.11 (on CUDA) and 2.13: `V.graph`'s `operations`, `name_to_buffer`, `graph_inputs`
and `graph_outputs`; of operations `inputs`, `op_overload`, `get_outputs` and `get_inputs_that_alias_output`;
`InvokeSubgraph` and `Conditional` with their subgraphs and `operands`; `MultiOutput.indices`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from memo_compile.codegen.emitted.known import is_known_op

# Operations of torch/_inductor/ir.py of which all readers and writers are among their dependencies, and that keep
# nothing: kernels that Inductor writes, and calls of kernels with a place for the result.
_KNOWN = frozenset(
    {
        *("ComputedBuffer", "NopKernel", "ConcatKernel", "DeviceCopy", "RandomSeeds", "UserDefinedTritonKernel"),
        *("InplaceBernoulliFallback", "InplaceCopyFallback", "ScatterFallback", "IndexPutFallback"),
        *("DynamicScalar", "AssertScalar", "DynamicSelectStorageOffset", "DynamicSliceSize", "TMADescriptor"),
    }
)


def knows_all(gm: fx.GraphModule) -> bool:
    """Whether nothing in a graph may keep, or give back, what it is given: no region, no op that memo does not know."""
    called = [n.target for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    ops = [target for target in called if isinstance(target, torch._ops.OperatorBase)]
    started = [op for op in ops if is_known_op(op) and getattr(op, "namespace", "") == "_c10d_functional"]
    waits = sum("wait_tensor" in str(op) for op in started)
    return all(map(is_known_op, ops)) and 2 * waits >= len(started)


def held_buffers(graph: Any) -> frozenset[str]:
    """Names of all buffers that a graph gives to, or gets from, what memo does not know."""
    held: set[str] = set()
    for operation in graph.operations:
        if _is_item(operation):
            keeps = _parent(operation).get_name() in held
        else:
            keeps = not _is_known(operation) or _is_never_waited_for(operation, graph)
        if keeps:
            held |= _names_of(operation)
    return frozenset(held | {root for name in held for root in roots_of(graph, name)})


def views_of(graph: Any, name: str) -> tuple[str, ...]:
    """The buffers, or inputs, that a buffer is a view of, or may be; none where it has a storage of its own."""
    from torch._inductor import ir  # loads Inductor

    buffer = graph.name_to_buffer.get(name)
    if isinstance(buffer, ir.FallbackKernel):
        return tuple(buffer.get_inputs_that_alias_output())
    if buffer is not None and _is_item(buffer):
        return tuple(_given_back(_parent(buffer), buffer.indices))
    return ()


def _is_known(operation: Any) -> bool:
    from torch._inductor import ir  # loads Inductor

    op, kind = getattr(operation, "op_overload", None), type(operation)
    if op is not None:
        return is_known_op(op)
    return kind.__name__ in _KNOWN or issubclass(kind, (ir.TemplateBuffer, ir.ExternKernelOut))


def _is_item(operation: Any) -> bool:
    return type(operation).__name__ == "MultiOutput"


def _parent(item: Any) -> Any:
    return item.inputs[0]


def _names_of(operation: Any) -> set[str]:
    """Of the buffers that an operation is given, and makes."""
    given = [value.get_name() for value in pytree.tree_leaves(operation.inputs) if has_name(value)]
    return {*given, *(buffer.get_name() for buffer in operation.get_outputs())}


def has_name(value: Any) -> bool:
    """Whether a lowered value lies in a buffer, or will."""
    from torch._inductor import ir  # loads Inductor

    return isinstance(value, (ir.TensorBox, ir.StorageBox, ir.BaseView, ir.Buffer))


def _is_never_waited_for(operation: Any, graph: Any) -> bool:
    """Whether a collective is started here, and not waited for in this graph."""
    theirs = _names_of(operation) if _collective(operation) else set()
    if not theirs or _collective(operation) == "wait_tensor":
        return False
    return not any(theirs & _waited_for(o) for o in graph.operations if _collective(o) == "wait_tensor")


def _collective(operation: Any) -> str:
    op: Any = getattr(operation, "op_overload", None)
    return str(op._opname) if getattr(op, "namespace", "") == "_c10d_functional" else ""


def _waited_for(wait: Any) -> set[str]:
    results = [value for value in pytree.tree_leaves(wait.inputs) if has_name(value)]
    items = [_parent(r) for r in results if _is_item(r)]
    return {value.get_name() for value in (*results, *items)}


def roots_of(graph: Any, name: str) -> set[str]:
    """All buffers that a buffer is a view of."""
    found: set[str] = set()
    stack = [name]
    while stack:
        for source in views_of(graph, stack.pop()):
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _given_back(region: Any, indices: Any) -> Iterator[str]:
    """The operands that one result of a region, or of a branch, is or lies in."""
    (_, index), *_ = indices or [(None, 0)]
    subgraphs = [getattr(region, field, None) for field in ("subgraph", "true_subgraph", "false_subgraph")]
    for subgraph in (s for s in subgraphs if s is not None and s.graph is not None):
        inner: Any = subgraph.graph
        result = inner.graph_outputs[index]
        if has_name(result):
            operands = getattr(region, "operands", None) or region.inputs
            given = list(inner.graph_inputs)
            roots = {result.get_name(), *roots_of(inner, result.get_name())}
            yield from (operands[given.index(r)].get_name() for r in sorted(roots) if r in given)
