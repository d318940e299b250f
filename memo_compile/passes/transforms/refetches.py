"""Lets values come from the host once more, where they would lie unread at the moment that holds the most.

What a layer starts from is read before its attention's backward, which makes queries, keys and values of it again, and
after that; in between it takes a place at the widest moment of all. Where the least memory is wanted, its place is free
meanwhile: the host has it still.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import torch
import torch.fx as fx

from memo_compile.passes.fx.facts import is_view_of, readers_of, storage_of, writes_in_place
from memo_compile.passes.transforms.prefetches import join_of
from memo_compile.passes.transforms.slices import fetch
from memo_compile.passes.transforms.tiles import places_of, program_in
from memo_compile.passes.transforms.transfers import size_of

WORTH = 0.02  # of the most bytes live: what is gained at least by all that comes twice


def fetch_again(backward: fx.GraphModule, live: Sequence[int], least: int = 0) -> fx.GraphModule:
    """Put a second fetch mark, or more, behind moments that hold the most, for values that are not read there.

    Args:
        backward: a graph with fetch marks.
        live: bytes live at each node, values that come back counted from their marks on.
        least: what is held at some time in any case, as the other graph of the step holds as much.
    """
    nodes = list(backward.graph.nodes)
    for mark, gaps in _gaps_to_leave(nodes, live, least).items():
        for gap in reversed(gaps):
            _come_again(mark, [r for r in _reading(mark) if r >= gap], gap)
    backward.graph.lint()
    backward.recompile()
    return backward


def _gaps_to_leave(nodes: Sequence[fx.Node], live: Sequence[int], least: int) -> Mapping[fx.Node, list[fx.Node]]:
    """For values that are to come again, the readers before which they do; none where too little is gained."""
    position = {n: i for i, n in enumerate(nodes)}
    marks = [
        n for n in nodes if n.target is fetch and join_of(n) is None
    ]  # other rows would have to stay, or be made again
    gaps = [(size_of(n), *gap, n) for n in marks for gap in _unread(n, position)]
    held, found = list(live), dict[fx.Node, list[fx.Node]]()
    while gaps and max(held) > least:
        widest = held.index(max(held))
        around = [gap for gap in gaps if gap[1] <= widest < gap[2]]
        if not around:
            break
        size, start, end, mark = max(around, key=lambda gap: gap[0])
        gaps.remove((size, start, end, mark))
        found.setdefault(mark, []).append(nodes[end])
        held[start:end] = [h - size for h in held[start:end]]
    return {m: sorted(g) for m, g in found.items()} if max(held) < (1 - WORTH) * max(live) else {}


def unread_ranges(backward: fx.GraphModule) -> dict[str, list[tuple[int, int]]]:
    """Of each input by name, the half-open ranges of steps between those that read it."""
    position = {n: i for i, n in enumerate(backward.graph.nodes)}
    return {n.name: _unread(n, position) for n in position if n.op == "placeholder"}


def _unread(value: fx.Node, position: Mapping[fx.Node, int]) -> list[tuple[int, int]]:
    """The half-open ranges of positions between those at which a value is read; none where it may change."""
    if _is_changed(value):
        return []
    at = sorted(position[r] for r in _reading(value))
    return [(a + 1, b) for a, b in pairwise(at) if b > a + 1]


def _reading(value: fx.Node) -> list[fx.Node]:
    """What reads a value or views of it, and is no view itself."""
    return [r for r in readers_of(value) if not is_view_of(r)]


def _is_changed(value: fx.Node) -> bool:
    """Whether something is written where a value lies, or it is returned: it is not what the host has, or it stays."""
    readers = readers_of(value)
    items = {u for r in readers for u in (r, *r.users) if not is_view_of(u)}
    places = {storage_of(p) for r in readers if program_in(r) is not None for p in places_of(r)}
    first_of_writers = {storage_of(r.all_input_nodes[0]) for r in readers if writes_in_place(r)}
    return (
        value in places | first_of_writers
        or any(storage_of(n) is value for n in items)
        or any(r.op == "output" or r.target is torch.ops.memo.onto.default for r in readers)
    )


def _come_again(mark: fx.Node, readers: Collection[fx.Node], first: fx.Node) -> None:
    """Let readers, of which this is the first, read a fetch of their own."""
    graph = mark.graph
    with graph.inserting_before(first):
        again = graph.node_copy(mark)
    for reader in readers:  # each with views of its own: what else these read may stand as late as their reader
        made = {mark: again}

        def anew(node: fx.Node, made: dict[fx.Node, fx.Node] = made) -> fx.Node:
            if storage_of(node) is mark and node not in made:
                made[node] = graph.node_copy(node, anew)
            return made.get(node, node)

        with graph.inserting_before(reader):
            for value in reader.all_input_nodes:
                reader.replace_input_with(value, anew(value))
    for node in reversed(list(graph.nodes)):
        if not node.users and is_view_of(node) and storage_of(node) is mark:
            graph.erase_node(node)
