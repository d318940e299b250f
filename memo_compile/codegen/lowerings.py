"""How Inductor lowers memo's ops that are no extern kernels of their own name.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `torch._inductor.lowering.register_lowering` and `clone`; of
`torch._inductor.ir` `ExternKernel.realize_input` and `copy_input`, `FallbackKernel.create`, `as_storage_and_layout`,
values' `get_read_names`; `V.graph.env`, `V.graph.current_node` and `V.graph.name_to_buffer`. With torch 2.11 and 2.13:
`ExternKernel.require_exact_strides`, `FixedLayout`, `ReinterpretView`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, partial
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from memo_compile.passes.fx.facts import storage_of
from memo_compile.passes.transforms.attention import are_apart, may_be_overwritten

POISON = "memo_poison"  # in `node.meta`: what the node may write over is to be filled


@cache
def register_lowerings() -> None:
    """Lower `memo::keep` as a copy, which fuses and lies in the arena, `memo::onto` as a view, and attention in place.

    `aten.clone` would not do: Inductor drops it where the copy would have the strides of the view that it copies
    (`remove_noop_ops`), and the rows that stay then hold the whole value.
    """
    from torch._inductor import lowering  # loads Inductor

    ops, module = torch.ops.memo, lowering
    untyped: dict[str, Any] = {"type_promotion_kind": None}
    register: Any = module.register_lowering
    register(ops.keep.default, **untyped)(lambda src: _in_memory(module.clone(src)))
    register(ops.onto.default, **untyped)(_place_over)
    for over, graph_op, emitted in (
        (2, ops.attention_onto, ops.attention_onto_),
        (3, ops.attention_backward_onto, ops.attention_backward_onto_),
    ):
        register(graph_op.default, **untyped)(partial(_write_over, over, emitted.default))


def _in_memory(box: Any) -> Any:
    box.realize()
    return box


def _write_over(over: int, kernel: Any, *args: Any, **keywords: Any) -> list[Any]:
    """Write over the buffers of the first `over` arguments, and return these as the results.

    One that something still reads is copied first: passes of Inductor may have joined it with another value since memo
    looked, and a value that the graph has made of it before may not be computed yet.
    With `verify="poison"` all are, and the originals are filled: a reader that was not seen shows.
    """
    from torch._inductor import ir  # loads Inductor
    from torch._inductor.virtualized import V

    graph: Any = V.graph
    node: fx.Node = graph.current_node
    tensors = [n for n in node.args if isinstance(n, fx.Node)]
    apart = are_apart(tensors[:over], tensors[over:])
    realized = [ir.ExternKernel.realize_input(box) for box in args[: len(tensors)]]
    names = [_storage(value).get_name() for value in realized]
    boxes: list[Any] = []
    ended: list[Any] = []
    for i, value in enumerate(realized[:over]):
        joined = any(
            names[i] == name and storage_of(tensors[i]) is not storage_of(other)
            for name, other in zip(names, tensors, strict=True)
        )
        alone = apart and not joined and may_be_overwritten(node, tensors[i])
        alone = alone and _is_its_own(names[i], graph) and not _is_read_later(node, names[i], graph.env)
        ends = alone and POISON in node.meta
        boxes.append(ir.TensorBox(value if alone and not ends else ir.ExternKernel.copy_input(args[i])))
        ended += [ir.TensorBox(value)] if ends else []
    storages = {_storage(box).get_name(): ir.TensorBox(_storage(box)) for box in boxes}
    ir.FallbackKernel.create(kernel, list(storages.values()), *boxes, *args[over:], **keywords)
    for box in ended:
        ir.FallbackKernel.create(torch.ops.memo.poison_.default, box)
    return boxes


def _place_over(src: Any, size: Any, stride: Any) -> Any:
    """The buffer of `src`, whose rows give way to those of another value, or that of a copy, as in `_write_over`."""
    from torch._inductor import ir  # loads Inductor
    from torch._inductor.virtualized import V

    graph: Any = V.graph
    node: fx.Node = graph.current_node
    operand: Any = node.args[0]
    lies_as = [int(s) for s in operand.meta["val"].stride()]
    src.realize()
    box: Any = ir.ExternKernel.require_exact_strides(src, lies_as)
    name = _storage(box).get_name()
    alone = _is_its_own(name, graph) and not _is_read_later(node, name, graph.env) and _fills(box)
    ended = _storage(box) if alone and POISON in node.meta else None
    if not alone or ended:
        box = ir.ExternKernel.require_exact_strides(ir.ExternKernel.copy_input(box), lies_as)
    if ended:
        ir.FallbackKernel.create(torch.ops.memo.poison_.default, ir.TensorBox(ended))
    layout = ir.FixedLayout(box.get_device(), box.get_dtype(), size, stride)
    return ir.TensorBox(ir.ReinterpretView(data=_storage(box), layout=layout))


def _fills(value: Any) -> bool:
    """Whether a lowered value is all that lies in its buffer."""
    from torch._inductor import ir  # loads Inductor

    storage, layout = ir.as_storage_and_layout(value, freeze=False)
    return layout.offset == 0 and storage.get_numel() == value.get_numel()


def _storage(value: Any) -> Any:
    from torch._inductor import ir  # loads Inductor

    return ir.as_storage_and_layout(value, freeze=False)[0]


def _is_its_own(name: str, graph: Any) -> bool:
    """Whether a buffer is no input, no view of another, and has no views that are buffers themselves."""
    buffer = graph.name_to_buffer.get(name)
    if buffer is None or name in graph.graph_inputs or buffer.get_inputs_that_alias_output():
        return False
    return not any(name in other.get_inputs_that_alias_output() for other in graph.name_to_buffer.values())


def _is_read_later(node: fx.Node, name: str, env: dict[fx.Node, Any]) -> bool:
    """Whether a value with readers to come lies in the buffer, or is to be computed from it.

    Inductor lowers some ops to nothing, so that two values of a graph are one buffer, and elementwise ones to formulas,
    which read where their own readers do.
    """
    waiting = [value for other, value in env.items() if any(user > node for user in other.users)]
    return any(name in _touched(leaf) for leaf in pytree.tree_leaves(waiting))


def _touched(value: Any) -> Collection[str]:
    """Names of the buffers that reading a lowered value reads."""
    from torch._inductor import ir  # loads Inductor

    if not isinstance(value, (ir.TensorBox, ir.StorageBox, ir.BaseView, ir.Buffer)):
        return ()
    if ir.is_storage_and_layout(value):
        return (_storage(value).get_name(),)
    names: Collection[str] = value.get_read_names()
    return names
