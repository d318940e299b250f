"""Lets regions of token-wise ops run tile by tile: one call of memo's in the place of all their nodes.

The call is given places for its results, and fills them: rows by rows, and sums over all tokens. What is between lives
for one tile. Where the graph is a backward that makes inner values of the forward again, those go with the tile too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.analysis.regions import Region, find_regions
from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import is_dense, source_line, storage_of
from memo_compile.passes.fx.meta import WHY
from memo_compile.passes.transforms.tile_bodies import (
    Accumulate,
    Program,
    accumulator_bytes,
    bodies,
    keep_program,
    program_of,
    programs,
)
from memo_compile.passes.transforms.tile_copies import make_again_in_tiles

TILED = "memo.tiled_.default"
# Where Inductor looks for the strides that an op's operands must have; without it lays values out as it likes.
AS_GIVEN = "eager_input_vals"


def tile_regions(
    gm: fx.GraphModule, tiles: int, wide: int, *, fused: bool, prefix: str, accumulate: Accumulate = "float32"
) -> fx.GraphModule:
    """Run each region around values of at least `wide` bytes in about `tiles` tiles.

    The calls are named `prefix` and their number, so that what they cost can be told by name.
    """
    make_again_in_tiles(gm, wide)
    for i, region in enumerate(find_regions(gm, wide)):
        if can_be_called(region):
            _outline(gm, region, program_of(region, tiles, accumulate), fused, f"{prefix}_{i}")
    gm.graph.lint()
    gm.recompile()
    return gm


def can_be_called(region: Region) -> bool:
    """Whether all that a region reads and makes are dense tensors of known sizes and strides, on one device."""
    made = [*region.results, *region.sums]
    inside = set(region.nodes)
    read = [a for n in (*region.nodes, *region.sums) for a in n.all_input_nodes if a not in inside]
    values = [n.meta.get("val") for n in (*made, *read)]
    if not all(isinstance(v, torch.Tensor) and all(isinstance(s, int) for s in v.shape) for v in values):
        return False
    if not all(_is_laid_out_as_told(n) for n in read):
        return False
    return all(is_dense(n) for n in made) and len({v.device for v in values if v.dim()}) == 1  # type: ignore[union-attr]


def _is_laid_out_as_told(node: fx.Node) -> bool:
    """Whether Inductor leaves a value's strides as the graph has them: bodies are compiled for these.

    It makes what is transposed in the graph row after row where it likes.
    """
    storage = storage_of(node)
    value = storage.meta.get("val")
    return storage.op == "placeholder" or (isinstance(value, torch.Tensor) and is_dense(storage))


def program_in(node: fx.Node) -> Program | None:
    """The program that a node calls; None for any other node."""
    return programs()[str(node.args[2])] if str(node.target) == TILED else None


def programs_of(gm: fx.GraphModule) -> dict[str, Program]:
    """The programs that a graph calls, by their keys."""
    calls = (n for n in gm.graph.nodes if str(n.target) == TILED)
    return {key: programs()[key] for key in (str(n.args[2]) for n in calls)}


def _outline(
    gm: fx.GraphModule, region: Region, found: tuple[Program, list[fx.Node]] | None, fused: bool, name: str
) -> None:
    if found is None:
        return
    program, operands = found
    made = [*region.results, *region.sums]
    graph, first = gm.graph, _first_place(region)
    why = (
        f"{len(program.tiles)} tiles of {program.rows} tokens: {source_line(region.nodes[-1]) or region.nodes[-1].name}"
    )
    with graph.inserting_before(first):
        places = [_place(graph, node) for node in made]
        node = graph.create_node("call_function", torch.ops.memo.tiled_.default, name=name)
    node.meta.update({"val": None, WHY: why})
    call_program(node, program, places, operands, fused=fused)
    _replace(gm, region, dict(zip(made, places, strict=True)), node)


def call_program(
    node: fx.Node, program: Program, places: Sequence[fx.Node], operands: Sequence[fx.Node], *, fused: bool
) -> None:
    """Let a node call a program with these places and operands; it is kept with what it takes for itself."""
    scratch = accumulator_bytes(program, [n.meta["val"] for n in places])
    scratch += max(scratch_of(bodies()[key], fused=fused) for key in program.kinds)
    key = keep_program(replace(program, scratch=scratch))
    node.args = (list(places), list(operands), key)
    node.meta[AS_GIVEN] = (((None,) * len(places), [n.meta["val"] for n in operands], key), {})


def scratch_of(body: fx.GraphModule, *, fused: bool) -> int:
    """Bytes that running a body holds at most beside what it is given."""
    return max(lifetimes(body, fused=fused).live_bytes(), default=0)


def _first_place(region: Region) -> fx.Node:
    """The node before which all that the region reads is there.

    What reads a result may stand before it, and is moved after the call.
    """
    inside = {*region.nodes, *region.sums}
    order = {n: i for i, n in enumerate(region.nodes[0].graph.nodes)}
    filled = {place: n for n in order if program_in(n) is not None for place in places_of(n)}
    read = {a for n in inside for a in n.all_input_nodes if a not in inside}
    last = max((filled.get(a, a) for a in read), key=order.__getitem__)
    after = last.next
    while after.op == "placeholder":
        after = after.next
    first = min(inside, key=order.__getitem__)
    return after if order[after] > order[first] else first


def places_of(called: fx.Node) -> list[fx.Node]:
    """What a call fills."""
    places: Any = called.args[0]
    return list(places)


def _place(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """An empty value that lies in memory as the node's."""
    value: torch.Tensor = node.meta["val"]
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda d: (-strides[d], d))
    keywords = {"dtype": value.dtype, "device": value.device}
    sizes = [int(value.shape[d]) for d in order]
    empty = call(graph, torch.ops.aten.empty.memory_format, (sizes,), keywords)
    if order == list(range(value.dim())):
        return empty
    return call(graph, torch.ops.aten.permute.default, (empty, [order.index(d) for d in range(value.dim())]))


def _replace(gm: fx.GraphModule, region: Region, places: dict[fx.Node, fx.Node], called: fx.Node) -> None:
    inside = {*region.nodes, *region.sums}
    for node, place in places.items():
        node.replace_all_uses_with(place, delete_user_cb=lambda user: user not in inside)
    for node in reversed([n for n in gm.graph.nodes if n in inside]):
        gm.graph.erase_node(node)
    for node, place in places.items():
        if place.target is torch.ops.aten.empty.memory_format:
            place.name = node.name  # by which plans know it
    _readers_after(gm.graph, set(places.values()), called)


def _readers_after(graph: fx.Graph, places: set[fx.Node], called: fx.Node) -> None:
    """Put what reads a result after the call that makes it, keeping the order of all else."""
    late, at = set(places), called
    for node in list(graph.nodes):
        if node is called:
            return
        if any(a in late for a in node.all_input_nodes) and node not in places:
            late.update((node, *(places_of(node) if program_in(node) is not None else ())))
            at.append(node)
            at = node
