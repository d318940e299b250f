"""What runs once for each tile of a region: a graph of its own, and what it is given of each operand.

A body is a graph over views of the operands' rows. It writes its results to rows of theirs, and adds what is summed
over tokens to accumulators. All tiles but the last have one body; the last has its own where it is shorter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.fx as fx

from memo_compile.passes.analysis.regions import Region
from memo_compile.passes.analysis.tile_rows import is_constant
from memo_compile.passes.analysis.token_axis import TokenAxis, shape_of
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.build import call, fake_mode, reshape
from memo_compile.passes.fx.facts import schema_name
from memo_compile.passes.transforms.token_slices import sliced_copy

LOW = frozenset({torch.bfloat16, torch.float16})
Accumulate = Literal["float32", "same"]
"""What tiles add up sums in that are of low precision."""


@dataclass(frozen=True)
class Part:
    """What a tile gets of one tensor: its rows along `axis`, or all of it."""

    axis: TokenAxis | None

    def of(self, value: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        """A view of the token rows [lo, hi) of `value`, as far as it has them."""
        axis = self.axis
        if axis is None:
            return value
        hi = min(hi, axis.tokens)
        if axis.outer == 1:
            return value.narrow(axis.dim, lo * axis.inner, (hi - lo) * axis.inner)
        wide = value.unflatten(axis.dim, (axis.outer, axis.tokens, axis.inner))
        return wide.narrow(axis.dim + 1, lo, hi - lo)


@dataclass(frozen=True)
class Program:
    """A region as the loop that runs it.

    Attributes:
        bodies: keys of the bodies of all tiles but the last, and of the last.
        operands: what a tile gets of each operand, in order.
        results: what a tile gets of each result to write to; an accumulator is given whole.
        accumulators: for each result the dtype in which it is summed; None where it is written row by row.
        tokens, rows: of all tiles, and of one.
        scratch: bytes that a call takes for itself.
    """

    bodies: tuple[str, str]
    operands: tuple[Part, ...]
    results: tuple[Part, ...]
    accumulators: tuple[torch.dtype | None, ...]
    tokens: int
    rows: int
    scratch: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The keys of its bodies, each once."""
        return tuple(dict.fromkeys(self.bodies))

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """Their half-open ranges of token rows."""
        return [(lo, min(lo + self.rows, self.tokens)) for lo in range(0, self.tokens, self.rows)]


@cache
def bodies() -> dict[str, fx.GraphModule]:
    """The bodies that this process has made, by their keys: equal regions have one."""
    return {}


@cache
def programs() -> dict[str, Program]:
    """The programs that this process has made, by their keys."""
    return {}


def rows_of_a_tile(region: Region, tiles: int) -> int:
    """Token rows of a tile, so that there are about `tiles` and each value has rows in the last one."""
    shortest = min(r.tokens for r in _axes(region))
    for rows in range(max(1, -(-region.tokens // tiles)), region.tokens):
        if (region.tokens - 1) // rows * rows < shortest:
            return rows
    return region.tokens


def _axes(region: Region) -> list[TokenAxis]:
    found = []
    for node in (*region.nodes, *region.sums):
        found.append(region.rows[node].axis)
        found += [need for need in region.rows[node].needs if need is not None]
    return found


def operands_of(region: Region) -> list[tuple[fx.Node, TokenAxis | None]]:
    """What a region reads from outside, each value with the axis along which it is cut; None: needed whole."""
    inside = set(region.nodes)
    found: dict[tuple[fx.Node, TokenAxis | None], None] = {}
    for node in (*region.nodes, *region.sums):
        for operand, need in zip(node.all_input_nodes, region.rows[node].needs, strict=True):
            if operand not in inside:
                found[operand, need] = None
    return list(found)


@dataclass
class _Writing:
    """A body while it is written, for the token rows [lo, hi)."""

    graph: fx.Graph
    region: Region
    lo: int
    hi: int
    made: dict[fx.Node, fx.Node]
    given: dict[tuple[fx.Node, TokenAxis | None], fx.Node]

    def info(self, node: fx.Node) -> TokenInfo:
        rows = self.region.rows[node]
        return TokenInfo(rows.axis, rows.needs, True, False, "")

    def range_of(self, axis: TokenAxis) -> tuple[int, int]:
        return self.lo, min(self.hi, axis.tokens)

    def rows(self, axis: TokenAxis) -> int:
        lo, hi = self.range_of(axis)
        return axis.outer * (hi - lo) * axis.inner

    def arguments(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        needs = zip(node.all_input_nodes, self.region.rows[node].needs, strict=True)
        return {a: self.made[a] if a in self.made else self.given[a, need] for a, need in needs}

    def placeholder(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def folded(self, node: fx.Node, part: Part, whole: torch.Tensor) -> fx.Node:
        """The rows of an operand in its own rank."""
        if part.axis is None or part.axis.outer == 1:
            return node
        sizes = [int(s) for s in whole.shape]
        sizes[part.axis.dim] = self.rows(part.axis)
        return reshape(self.graph, node, sizes)

    def compute(self, node: fx.Node) -> None:
        """One node of the region, for the rows of this tile."""
        self.made[node] = self.sized(node) or sliced_copy(
            self.graph, node, self.info(node), self.arguments(node), *self.range_of(self.region.rows[node].axis)
        )

    def sized(self, node: fx.Node) -> fx.Node | None:
        """An op that names sizes, of which those along the tokens are the tile's; None for any other."""
        axis, name = self.region.rows[node].axis, schema_name(node)
        given, args = self.arguments(node), list[Any](node.args)
        rows = self.rows(axis)
        if is_constant(node):
            args[0] = _resized(args[0], axis.dim, rows)
        elif name == "aten::slice" and self.cut(node) is not None:
            args = [args[0], args[1], 0, rows]
        elif name == "aten::slice_scatter" and self.cut(node, 1) is not None:
            args = [args[0], args[1], args[2] if len(args) > 2 else 0, 0, self.cut(node, 1)]
        elif name == "aten::slice_backward":
            args = [args[0], _resized(args[1], axis.dim, rows), args[2], 0, self.cut(node) or rows, 1]
        elif name == "aten::constant_pad_nd" and self.cut(node) is not None:
            pads = list(args[1])
            pads[2 * (len(shape_of(node)) - 1 - axis.dim) + 1] = rows - int(self.cut(node) or 0)
            args[1] = pads
        else:
            return None
        new: Any = fx.node.map_arg((tuple(args), dict(node.kwargs)), lambda n: given[n])
        return call(self.graph, node.target, *new)

    def cut(self, node: fx.Node, operand: int = 0) -> int | None:
        """Rows that the operand has in this tile, where it has others in all than the result."""
        source = node.args[operand]
        needs = dict(zip(node.all_input_nodes, self.region.rows[node].needs, strict=True))
        axis = needs[source] if isinstance(source, fx.Node) else None
        return None if axis is None or axis.tokens == self.region.rows[node].axis.tokens else self.rows(axis)


def _resized(sizes: Any, dim: int, rows: int) -> list[int]:
    return [rows if i == dim else int(s) for i, s in enumerate(sizes)]


def body_of(
    region: Region,
    operands: Sequence[tuple[fx.Node, TokenAxis | None]],
    lo: int,
    hi: int,
    accumulate: Accumulate = "float32",
) -> fx.GraphModule:
    """The graph that computes the token rows [lo, hi) of a region, over views of `operands` and of its results."""
    w = _Writing(fx.Graph(), region, lo, hi, {}, {})
    with fake_mode(region.nodes[0].graph):
        views = [w.placeholder(f"operand_{i}", Part(a).of(n.meta["val"], lo, hi)) for i, (n, a) in enumerate(operands)]
        places = [
            w.placeholder(f"result_{i}", part.of(torch.empty_like(value, dtype=dtype or value.dtype), lo, hi))
            for i, (value, part, dtype) in enumerate(_places(region, accumulate))
        ]
    for view, (node, axis) in zip(views, operands, strict=True):
        w.given[node, axis] = w.folded(view, Part(axis), node.meta["val"])
    for node in region.nodes:
        w.compute(node)
    for node, place in zip(region.results, places, strict=False):
        _write(w, node, place)
    for node, place in zip(region.sums, places[len(region.results) :], strict=True):
        _add(w, node, place)
    w.graph.output(())
    w.graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), w.graph)


def _places(region: Region, accumulate: Accumulate) -> list[tuple[torch.Tensor, Part, torch.dtype | None]]:
    """Of each result, its value, what a tile gets of it, and the dtype of its accumulator."""
    rows = [(n.meta["val"], Part(region.rows[n].axis), None) for n in region.results]
    return rows + [(n.meta["val"], Part(None), _summed_in(n.meta["val"].dtype, accumulate)) for n in region.sums]


def _summed_in(dtype: torch.dtype, accumulate: Accumulate) -> torch.dtype:
    return torch.float32 if dtype in LOW and accumulate == "float32" else dtype


def _write(w: _Writing, node: fx.Node, place: fx.Node) -> None:
    made, shape = w.made[node], list(place.meta["val"].shape)
    if list(made.meta["val"].shape) != shape:
        made = reshape(w.graph, made, shape)
    call(w.graph, torch.ops.aten.copy_.default, (place, made))


def _add(w: _Writing, node: fx.Node, place: fx.Node) -> None:
    given = w.arguments(node)
    args: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: given[n])
    accumulator: torch.Tensor = place.meta["val"]
    if schema_name(node) == "aten::mm" and accumulator.dtype == node.meta["val"].dtype:
        call(w.graph, torch.ops.memo.addmm_onto_.default, (place, *args[0]))
        return
    term = call(w.graph, node.target, *args)
    if accumulator.dtype != node.meta["val"].dtype:
        term = call(w.graph, torch.ops.prims.convert_element_type.default, (term, accumulator.dtype))
    total = call(w.graph, torch.ops.aten.add.Tensor, (place, term))
    call(w.graph, torch.ops.aten.copy_.default, (place, total))


def program_of(region: Region, tiles: int, accumulate: Accumulate) -> tuple[Program, list[fx.Node]] | None:
    """The loop that runs a region in about `tiles` tiles, and its operands; None where that would be one tile."""
    rows = rows_of_a_tile(region, tiles)
    if rows >= region.tokens:
        return None
    operands = operands_of(region)
    last = (region.tokens - 1) // rows * rows
    whole = last + rows == region.tokens == min(a.tokens for a in _axes(region))
    tail = keep_body(body_of(region, operands, last, region.tokens, accumulate))
    body = tail if whole else keep_body(body_of(region, operands, 0, rows, accumulate))
    places = _places(region, accumulate)
    program = Program(
        (body, tail),
        tuple(Part(axis) for _, axis in operands),
        tuple(part for _, part, _ in places),
        tuple(dtype for _, _, dtype in places),
        region.tokens,
        rows,
    )
    return program, [node for node, _ in operands]


def keep_body(body: fx.GraphModule) -> str:
    """Keep a body in this process; returns its key."""
    given = [(tuple(v.shape), v.stride(), v.dtype, str(v.device)) for v in inputs_of(body)]
    key = hashlib.sha256(f"{body.graph} {given}".encode()).hexdigest()[:16]
    bodies()[key] = body  # an earlier one's fake values are of another compilation
    return key


def inputs_of(body: fx.GraphModule) -> list[torch.Tensor]:
    """The fake values of a body's inputs."""
    return [n.meta["val"] for n in body.graph.find_nodes(op="placeholder")]


def keep_program(program: Program) -> str:
    """Keep a program in this process; returns its key."""
    key = hashlib.sha256(repr(replace(program, scratch=0)).encode()).hexdigest()[:16]
    programs()[key] = program
    return key


def accumulator_bytes(program: Program, results: Sequence[torch.Tensor]) -> int:
    """Bytes of the accumulators that are none of the results themselves."""
    pairs = zip(results, program.accumulators, strict=True)
    return sum(v.numel() * d.itemsize for v, d in pairs if d is not None and d != v.dtype)
