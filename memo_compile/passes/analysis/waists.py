"""Finds where a region may be run as two, one after the other, so that less is held at once.

A *waist* is a value through which all goes that leads from one side of a region to the other, such as the stream of
residuals between two layers, or its gradient. As one call a region holds all that it reads and makes. As two, what the
second reads need not be there before, and what the first has read may be gone: what is between is the waist.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import networkx as nx
import torch.fx as fx

from memo_compile.passes.analysis.tile_rows import Rows
from memo_compile.passes.analysis.token_axis import is_tensor
from memo_compile.passes.fx.facts import is_view, is_view_of, nbytes, storage_of
from memo_compile.passes.fx.meta import ROLE

MOST = 2000  # nodes of a region that is looked at: one of so many has no attention in it, and layers without end
WORTH = 0.5  # of a waist's bytes: what a division saves at least


@dataclass(frozen=True)
class Division:
    """A region as two: `before` ends in the waist. `held` bytes are those of the wider call."""

    before: frozenset[fx.Node]
    after: frozenset[fx.Node]
    held: int


def divisions(part: Collection[fx.Node], rows: Mapping[fx.Node, Rows]) -> list[Division]:
    """The ways to run what hangs together as two calls that are worth it, first what holds least.

    Args:
        part: nodes that hang together, sums among them.
        rows: the axes of all of these.
    """
    if len(part) > MOST:
        return []
    graph = nx.Graph((a, n) for n in part for a in n.all_input_nodes if a in part)
    whole = frozenset(part)
    allowed = _held(whole, rows)
    found: list[tuple[int, int, Division]] = []
    for waist in sorted(nx.articulation_points(graph)):
        sides = _sides(waist, whole, graph) if is_tensor(waist) and not rows[waist].summed else None
        if sides is not None and not is_view(waist):
            held = _held_as_two(*sides, waist, rows)
            if held + WORTH * nbytes(waist) < allowed:
                found.append((held, nbytes(waist), Division(*sides, held)))
    return [division for _, _, division in sorted(found, key=lambda f: f[:2])]


def _sides(
    waist: fx.Node, part: frozenset[fx.Node], graph: nx.Graph
) -> tuple[frozenset[fx.Node], frozenset[fx.Node]] | None:
    """What comes before a node, with it, and what comes after it; None where more than it leads across."""
    without = graph.subgraph(part - {waist})
    before = {waist}
    for source in waist.all_input_nodes:
        if source in part and source not in before:
            before |= nx.node_connected_component(without, source)
    after = part - before
    readers = [u for u in waist.users if u in part]
    if len(before) == 1 or not readers or any(u in before for u in readers):
        return None
    return frozenset(before), after


def _held_as_two(
    before: frozenset[fx.Node], after: frozenset[fx.Node], waist: fx.Node, rows: Mapping[fx.Node, Rows]
) -> int:
    """Bytes of the wider of two calls, and of what lies there meanwhile: results, and operands that are there early."""
    later = _operands(after, rows) - _operands(before, rows) - {storage_of(waist)}
    done = _results(before, rows) - {storage_of(waist)}
    first = _held(before, rows) + sum(nbytes(n) for n in later if not _is_given(n))
    return max(first, _held(after, rows) + sum(map(nbytes, done)))


def _is_given(node: fx.Node) -> bool:
    """Whether a value is given to the graph, or was saved for it: then it may come from the host when it is needed.

    Before it is decided where saved values stay, and after, the same is said of them.
    """
    return node.op == "placeholder" or ROLE in node.meta


def _held(part: Collection[fx.Node], rows: Mapping[fx.Node, Rows]) -> int:
    """Bytes of what is read and made row by row; results lie where operands did that the graph made for this alone."""
    operands, results = _operands(part, rows), _results(part, rows)
    free = [nbytes(n) for n in operands if not _is_given(n) and all(u in part or is_view_of(u) for u in n.users)]
    total = sum(map(nbytes, operands | results))
    for size in map(nbytes, results - operands):
        if size in free:
            free.remove(size)
            total -= size
    return total


def _operands(part: Collection[fx.Node], rows: Mapping[fx.Node, Rows]) -> frozenset[fx.Node]:
    pairs = ((a, need) for n in part for a, need in zip(n.all_input_nodes, rows[n].needs, strict=True))
    return frozenset(storage_of(a) for a, need in pairs if a not in part and need is not None)


def _results(part: Collection[fx.Node], rows: Mapping[fx.Node, Rows]) -> frozenset[fx.Node]:
    return frozenset(storage_of(n) for n in part if not rows[n].summed and any(u not in part for u in n.users))
