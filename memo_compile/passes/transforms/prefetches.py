"""Starts prefetches in the backward as early as the link needs, and waits for them where their slices are read.

`slices` leaves each slice that comes back as a mark where it is first needed. Here the marks become a prefetch buffer,
the start of its prefetch and a wait. A slice lands where it is read: nothing copies it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.build import call, fake_mode
from memo_compile.passes.fx.facts import readers_of
from memo_compile.passes.fx.meta import FOR, ROLE, WHY, Role
from memo_compile.passes.transforms.slices import fetch
from memo_compile.passes.transforms.transfers import SLACK, Room, begins_of, size_of


def schedule_prefetches(
    backward: fx.GraphModule,
    seconds: Callable[[fx.Node], float],
    rate: float,
    *,
    overlap: bool = True,
    live: Sequence[int] = (),
) -> fx.GraphModule:
    """Replace each fetch mark by a prefetch buffer, a prefetch that starts early enough at `rate` bytes/s, and a wait.

    With `overlap=False` a prefetch starts where it is needed: the least memory, and no overlap. `live` are the bytes
    live at each node, values that come back counted from their marks on: a prefetch starts earlier by the slack as long
    as clearly less than the most of them is then live; without `live`, there is no slack.
    """
    graph = backward.graph
    nodes = list(graph.nodes)
    marks = [n for n in nodes if n.target is fetch]
    starts = _starts(nodes, marks, begins_of(nodes, seconds), rate, Room(live)) if overlap else marks
    # All starts stand before a mark is replaced, in the order in which they are needed: so the link serves them.
    prefetch_buffers = [(mark, _start(graph, mark, start)) for mark, start in zip(marks, starts, strict=True)]
    for mark, buffer in prefetch_buffers:
        _land(graph, mark, buffer)
    backward.recompile()
    return backward


def _starts(
    nodes: list[fx.Node], marks: list[fx.Node], begins: dict[fx.Node, float], rate: float, room: Room
) -> list[fx.Node]:
    """Before which node each prefetch starts: when the link needs it to, and earlier where there is room."""
    position = {n: i for i, n in enumerate(nodes)}
    first = next(i for i, n in enumerate(nodes) if n.op != "placeholder")
    needed: dict[fx.Node, int] = {}
    link_free = float("inf")
    for mark in reversed(marks):  # the last needed first: what is needed before it pushes it ahead
        link_free = min(begins[mark], link_free) - size_of(mark) / rate
        start = position[mark]
        while start > first and begins[nodes[start]] > link_free:
            start -= 1
        room.hold(_prefetch_bytes(mark), start, position[mark])
        needed[mark] = start
    earliest = first  # never before the start of what is needed sooner
    starts: list[fx.Node] = []
    for mark in marks:
        start, size = needed[mark], _prefetch_bytes(mark)
        latest = begins[nodes[start]] - SLACK * begins[nodes[-1]]
        while start > earliest and begins[nodes[start]] > latest and room.has(size, start - 1):
            start -= 1
            room.hold(size, start, start + 1)
        earliest = start
        starts.append(nodes[start])
    return starts


def _start(graph: fx.Graph, mark: fx.Node, start: fx.Node) -> fx.Node:
    """Take the prefetch buffer and start the prefetch: where it is read, in its rows of the whole value."""
    join = join_of(mark)
    with graph.inserting_before(start):
        buffer = _empty(graph, mark if join is None else join)
        buffer.meta.update({WHY: f"where they land: {mark.meta.get(WHY, '')}", FOR: mark.meta.get(FOR, "")})
        buffer.meta[ROLE] = Role.PREFETCH_BUFFER
        rows = buffer if join is None else _rows(graph, buffer, join, 0)
        _transfer(graph, torch.ops.memo.prefetch_.default, rows, mark, "the copy starts, early enough for the link")
    return buffer


def _land(graph: fx.Graph, mark: fx.Node, buffer: fx.Node) -> None:
    """Put the whole value together in the prefetch buffer, and wait for what was prefetched."""
    join = join_of(mark)
    whole = mark if join is None else join
    with graph.inserting_before(whole):
        if join is not None:
            for index in range(1, len(parts_of(join))):
                _write(graph, parts_of(join)[index], _rows(graph, buffer, join, index))
        # Last: the other rows are made while these are on their way.
        rows = buffer if join is None else _rows(graph, buffer, join, 0)
        _transfer(graph, torch.ops.memo.wait_.default, rows, mark, "the copy must have ended")
    whole.replace_all_uses_with(buffer)
    graph.erase_node(whole)
    if join is not None:
        _erase_unused(graph, mark)


def join_of(mark: fx.Node) -> fx.Node | None:
    """The `cat` that joins a slice with rows of other homes, of which it is the first part."""
    (reader,) = mark.users if len(mark.users) == 1 else (None,)
    if reader is not None and reader.target is torch.ops.aten.reshape.default and len(reader.users) == 1:
        (reader,) = reader.users
    if reader is None or reader.target is not torch.ops.aten.cat.default:
        return None
    first, *others = map(base_of, parts_of(reader))
    alike = reader.meta["val"].dtype == mark.meta["val"].dtype
    return reader if first is mark and mark not in others and alike else None


def base_of(part: fx.Node) -> fx.Node:
    return part.all_input_nodes[0] if part.target is torch.ops.aten.reshape.default else part


def parts_of(join: fx.Node) -> list[fx.Node]:
    parts: Any = join.args[0]
    return list(parts)


def _empty(graph: fx.Graph, like: fx.Node) -> fx.Node:
    value: torch.Tensor = like.meta["val"]
    kwargs = {"dtype": value.dtype, "device": value.device}
    return call(graph, torch.ops.aten.empty.memory_format, (list(value.shape),), kwargs)


def _rows(graph: fx.Graph, buffer: fx.Node, join: fx.Node, index: int) -> fx.Node:
    """Where one part of a join lies in it."""
    dim: Any = join.args[1]
    sizes = [part.meta["val"].shape[dim] for part in parts_of(join)]
    begin = sum(sizes[:index])
    return call(graph, torch.ops.aten.slice.Tensor, (buffer, dim, begin, begin + sizes[index]))


def _transfer(graph: fx.Graph, target: Any, rows: fx.Node, mark: fx.Node, why: str) -> None:
    lease, offset = mark.args[:2]
    node = graph.call_function(target, (rows, lease, offset))
    node.meta.update({"val": None, WHY: f"{why}: {mark.meta.get(WHY, '')}", FOR: mark.meta.get(FOR, "")})


def _write(graph: fx.Graph, part: fx.Node, rows: fx.Node) -> None:
    """Write a part to its rows: a matmul directly, everything else by a copy that a compiler fuses."""
    matmul = _matmul_of(part)
    place = _as_matrix(graph, rows, matmul.meta["val"].shape) if matmul is not None else None
    if matmul is None or place is None:
        call(graph, torch.ops.aten.copy_.default, (rows, part))
        return
    plain = matmul.target is torch.ops.aten.mm.default
    target = torch.ops.memo.mm_into_.default if plain else torch.ops.memo.addmm_into_.default
    graph.call_function(target, (place, *matmul.args)).meta["val"] = None


def _matmul_of(part: fx.Node) -> fx.Node | None:
    """The matmul that a part is a view of, if it is that, nobody else reads it, and it may run later."""
    node = part
    while len(node.users) == 1 and node.target in _RESHAPES:
        node = node.all_input_nodes[0]
    matmul = node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return node if matmul and not node.kwargs and len(node.users) == 1 and not _is_written_over(node) else None


def _is_written_over(node: fx.Node) -> bool:
    """Whether what a node reads gives way to another value somewhere, which may be before it would run."""
    read = (reader for operand in node.all_input_nodes for reader in readers_of(operand))
    return any(r.target is torch.ops.memo.onto.default for r in read)


_RESHAPES = (
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
)


def _as_matrix(graph: fx.Graph, rows: fx.Node, shape: Any) -> fx.Node | None:
    """Rows of a larger value as a matrix, None where they are no view of that shape."""
    value: torch.Tensor = rows.meta["val"]
    try:
        with fake_mode(graph):
            value.view(shape)
    except (RuntimeError, ValueError):  # torch raises one or the other, by what a fake tensor knows of itself
        return None
    return call(graph, torch.ops.aten.view.default, (rows, list(shape)))


def _erase_unused(graph: fx.Graph, mark: fx.Node) -> None:
    for reader in list(mark.users):
        assert not reader.users
        graph.erase_node(reader)
    graph.erase_node(mark)


def _prefetch_bytes(mark: fx.Node) -> int:
    """Of the place that the whole value takes, other rows than the mark's included."""
    return size_of(join_of(mark) or mark)
