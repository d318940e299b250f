"""Lets what runs tile by tile write rows of its results over those rows of its operands that it reads last.

A tile has read its rows of an operand before it writes those of a result. So where nothing else reads the operand any
more, and rows of both lie in the same bytes, no place is needed for the result. Of the gradient of a layer's output the
gradient of its input is made that way, and of the gradients of queries those of what they were made of.

This is asked of the whole graph, when everything in it has its place: calls stand where the last of what they read is
made, and what reads their results is moved behind them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.fx as fx

from memo_compile.passes.analysis.tile_rows import GRADIENTS_OF_ATTENTION
from memo_compile.passes.analysis.token_axis import TokenAxis, is_tensor
from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import (
    MATMULS,
    is_dense,
    is_pointwise,
    is_view,
    is_write,
    nbytes,
    readers_of,
    schema_name,
    storage_of,
)
from memo_compile.passes.transforms.tile_bodies import Program, bodies, keep_body
from memo_compile.passes.transforms.tiles import call_program, places_of, program_in

Over = Mapping[int, int]
"""Of results, the operands over which they are written, each by its number."""


def write_over_operands(gm: fx.GraphModule, *, fused: bool) -> fx.GraphModule:
    """Let calls that run tile by tile write over operands, where they read these last."""
    for node in list(gm.graph.nodes):
        program = program_in(node)
        over = _written_over(node, program) if program is not None else {}
        if program is not None and over:
            _rewrite(node, program, over, fused)
    gm.graph.lint()
    gm.recompile()
    return gm


def _written_over(node: fx.Node, program: Program) -> dict[int, int]:
    """Which results of a call may lie where its operands do, largest first."""
    places, operands = places_of(node), _operands(node)
    free = [
        (i, part.axis)
        for i, (operand, part) in enumerate(zip(operands, program.operands, strict=True))
        if part.axis is not None and _has_a_storage_alone(operand, operands) and _is_read_last(operand, node)
    ]
    found: dict[int, int] = {}
    for j in sorted(range(len(places)), key=lambda j: nbytes(places[j]), reverse=True):
        axis = program.results[j].axis
        if axis is None or not _is_made_anew(program, j):
            continue
        wanted = _laid_out(places[j].meta["val"], axis)
        fitting = (o for o in free if _laid_out(operands[o[0]].meta["val"], o[1]) == wanted)
        place = next(fitting, None)
        if place is not None:
            found[j] = place[0]
            free.remove(place)
    return found


def _operands(node: fx.Node) -> list[fx.Node]:
    operands = node.args[1]
    assert isinstance(operands, (list, tuple))
    return [n for n in operands if isinstance(n, fx.Node)]


def _has_a_storage_alone(node: fx.Node, operands: Sequence[fx.Node]) -> bool:
    """Whether a value fills what the graph has made for it, and a tile reads that in no second way."""
    root = storage_of(node)
    alone = sum(storage_of(n) is root for n in operands) == 1
    return alone and _is_made_here(root) and is_tensor(root) and nbytes(root) == nbytes(node) and is_dense(node)


def _is_made_here(root: fx.Node) -> bool:
    """Whether a storage is one that plain ops allocate: no input, no item of several in one, nothing from the host."""
    if root.op != "call_function":
        return False
    if root.target is operator.getitem:
        made = root.args[0]
        return isinstance(made, fx.Node) and schema_name(made) in GRADIENTS_OF_ATTENTION
    plain = schema_name(root) in MATMULS or root.target is torch.ops.aten.empty.memory_format
    return plain or (is_pointwise(root) and not is_view(root))


def _is_read_last(operand: fx.Node, node: fx.Node) -> bool:
    """Whether all that reads what lies in a value's storage has run by then; copies to the host go on for a while."""
    return all(n <= node and not schema_name(n).startswith("memo::offload") for n in readers_of(operand))


def _is_made_anew(program: Program, result: int) -> bool:
    """Whether a result is no view of an operand, which would be read when that has been written over."""
    copies = [_copy_to(bodies()[key], len(program.operands) + result) for key in program.kinds]
    return all(storage_of(copy.all_input_nodes[1]).op == "call_function" for copy in copies)


def _copy_to(body: fx.GraphModule, place: int) -> fx.Node:
    """Where a body writes rows of a result, which is its input of that number."""
    (copy,) = (n for n in _inputs(body.graph)[place].users if is_write(n))
    return copy


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


def _laid_out(value: torch.Tensor, axis: TokenAxis) -> tuple[torch.device, torch.dtype, int, int, int]:
    """What there is of a dense value, and of a token's row in it: elements that lie together, tokens apart.

    Of two values that begin at the same place and agree in this, rows of one token lie in the same bytes.
    """
    return value.device, value.dtype, value.numel(), axis.tokens, int(value.stride(axis.dim)) * axis.inner


def _rewrite(node: fx.Node, program: Program, over: Over, fused: bool) -> None:
    places, operands = places_of(node), _operands(node)
    with node.graph.inserting_before(node):
        for j, i in over.items():
            _take(places[j], operands[i])
    made = {key: keep_body(_reading_below(bodies()[key], over, len(operands))) for key in program.kinds}
    first, last = program.bodies
    left = [i for i in range(len(operands)) if i not in over.values()]
    kept = replace(program, bodies=(made[first], made[last]), operands=tuple(program.operands[i] for i in left))
    call_program(node, kept, places_of(node), [operands[i] for i in left], fused=fused)


def _take(place: fx.Node, operand: fx.Node) -> None:
    """Put the operand's storage in the place of a new one, as the result lies in it."""
    graph, value = place.graph, place.meta["val"]
    made = call(graph, torch.ops.memo.onto.default, (operand, list(value.shape), list(value.stride())))
    place.replace_all_uses_with(made)
    name, sources = place.name, [place, *place.all_input_nodes]  # an empty value, and what turns it
    for source in sources:
        graph.erase_node(source)
    made.name = name  # by which plans know it


def _reading_below(body: fx.GraphModule, over: Over, operands: int) -> fx.GraphModule:
    """A body that finds rows of operands where it is to write those of results, and writes these last."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}) or ())
    (output,) = graph.find_nodes(op="output")
    inputs = _inputs(graph)
    for j, i in over.items():
        result, operand = inputs[operands + j], inputs[i]
        with graph.inserting_before(inputs[-1].next):
            below = _rows_below(graph, result, operand.meta["val"])
        operand.replace_all_uses_with(below)
        graph.erase_node(operand)
        (copy,) = (n for n in result.users if is_write(n))
        output.prepend(copy)
    return fx.GraphModule(torch.nn.Module(), graph)


def _rows_below(graph: fx.Graph, place: fx.Node, rows: torch.Tensor) -> fx.Node:
    """A copy of a tile's rows that lie where others are to be written, in the same order in memory.

    What Inductor computes from the rows themselves it would not write over when they are written over: logits, say. Nor
    can it fuse a copy that it makes itself (torch 2.13's fusion of outer loops looks for reads in what writes there).
    """
    sizes, strides = list(map(int, rows.shape)), list(map(int, rows.stride()))
    order = sorted(range(rows.dim()), key=lambda d: -strides[d])
    by_stride = ([of[d] for d in order] for of in (sizes, strides))
    below = call(graph, torch.ops.aten.as_strided.default, (place, *by_stride))
    kept = call(graph, torch.ops.memo.copied.default, (below,))
    return call(graph, torch.ops.aten.permute.default, (kept, [order.index(d) for d in range(rows.dim())]))
