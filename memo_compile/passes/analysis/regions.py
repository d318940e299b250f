"""Finds regions of token-wise ops whose inner values are large: what may run tile by tile.

A region grows from *wide* values, such as logits, along ops that go row by row, and through thin values between them,
such as the sums of a softmax, and what cheap ops make of one on the way to another, such as halves of heads. What reads
a wide value and makes a narrow one of it belongs to the region too, and so do sums over tokens, such as the gradient of
a weight.

What holds less as two calls, one after the other, is two regions (`waists`).

Regions are convex: no value leaves a region and comes back into it. Each node has a *stage*, which grows along every
edge that leaves a region; so nodes of one stage that hang together are convex.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from memo_compile.passes.analysis.tile_rows import Rows, tile_rows
from memo_compile.passes.analysis.token_axis import is_tensor, shape_of
from memo_compile.passes.analysis.waists import divisions
from memo_compile.passes.fx.facts import is_cheap, is_view, is_view_of, nbytes, storage_of

THIN = 4  # numbers a token, at most: what a reduction over a row leaves, or a label
NARROW = 32  # by this factor a value is smaller than one that it is made of, as adapters make them of a row


@dataclass(frozen=True)
class Region:
    """Nodes of one graph that may run tile by tile, in graph order.

    Attributes:
        nodes: what is computed row by row.
        sums: what reads `nodes` and adds up over all tokens.
        results: those of `nodes` that others read.
        rows: the axes of all of these.
        tokens: rows of the longest; some values may lack the last few.
        inside: bytes of the wide values that nobody else reads.
    """

    nodes: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    rows: Mapping[fx.Node, Rows]
    tokens: int
    inside: int


def find_regions(gm: fx.GraphModule, wide: int, returned: Collection[fx.Node] | None = None) -> list[Region]:
    """The regions around values of at least `wide` bytes, in graph order.

    Args:
        returned: what the graph returns, where that is not all that it now does: without what it would save.
    """
    rows = tile_rows(gm)
    large = {n for n, r in rows.items() if not r.summed and is_tensor(n) and nbytes(n) >= wide}
    if not large:
        return []
    few = THIN * min(_count(n, rows[n]) for n in large)
    thin = {n for n in made_of(large) if n in rows and not rows[n].summed and _is_thin(n, few)}
    several = {a for n in large for a in n.all_input_nodes if a in rows and not is_tensor(a)}  # of which one is wide
    between = _between(large, rows) | _narrowed(large, rows)
    candidates = {n for n in large | thin | several | between if _alone(n, rows)}
    candidates |= {n for n in rows if _adds_up(n, large, candidates, rows)}
    stages = _stages(gm, candidates, rows)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    found: list[Region] = []
    for part in _parts(candidates, stages, rows):
        if part & large:
            found += _divided(part, large, rows, order, candidates | _nodes_of(found), returned)
    return _in_some_order(gm, sorted(found, key=lambda r: order[r.nodes[0]]))


def _nodes_of(regions: Sequence[Region]) -> set[fx.Node]:
    return {n for r in regions for n in (*r.nodes, *r.sums)}


def _divided(
    part: set[fx.Node],
    large: Collection[fx.Node],
    rows: Mapping[fx.Node, Rows],
    order: Mapping[fx.Node, int],
    taken: Collection[fx.Node],
    returned: Collection[fx.Node] | None,
) -> list[Region]:
    """The region around a part, or several that hold less at once, where there is something inside of each."""
    for division in divisions(part, rows):
        first = _divided(set(division.before), large, rows, order, taken, returned)
        also = {*taken, *_nodes_of(first)}
        second = _divided(set(division.after), large, rows, order, also, returned) if first else []
        if second:
            return [*first, *second]
    region = _region(part, large, rows, order, taken, returned)
    return [region] if region is not None else []


def _in_some_order(gm: fx.GraphModule, regions: list[Region]) -> list[Region]:
    """Without regions that would have to run before others and after them."""
    if _can_be_ordered(gm, regions):  # so any of them can
        return regions
    chosen: list[Region] = []
    for region in regions:
        if _can_be_ordered(gm, [*chosen, region]):
            chosen.append(region)
    return chosen


def _can_be_ordered(gm: fx.GraphModule, regions: Sequence[Region]) -> bool:
    """Whether the graph with each region as one node has no cycle (Kahn 1962)."""
    group = {n: r.nodes[0] for r in regions for n in (*r.nodes, *r.sums)}
    readers: dict[fx.Node, set[fx.Node]] = {}
    waiting: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        of = group.get(node, node)
        waiting.setdefault(of, 0)
        for source in {group.get(a, a) for a in node.all_input_nodes} - {of}:
            if of not in readers.setdefault(source, set()):
                readers[source].add(of)
                waiting[of] += 1
    ready = [n for n, count in waiting.items() if not count]
    remaining = len(waiting)
    while ready:
        remaining -= 1
        for reader in readers.get(ready.pop(), ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    return remaining == 0


def _count(node: fx.Node, rows: Rows) -> int:
    """Tokens of all sequences."""
    return math.prod(shape_of(node)[: rows.axis.dim + 1])


def _numbers(node: fx.Node) -> int:
    return math.prod(shape_of(node))


def _is_thin(node: fx.Node, few: int) -> bool:
    values = node.meta["val"]
    values = values if isinstance(values, (tuple, list)) else [values]
    return all(isinstance(v, torch.Tensor) and v.numel() <= few for v in values)


def _alone(node: fx.Node, rows: Mapping[fx.Node, Rows]) -> bool:
    """Whether the node's value is a tensor, or a tuple all of whose items go row by row."""
    return is_tensor(node) or all(u in rows and not rows[u].summed for u in node.users)


def _between(large: Collection[fx.Node], rows: Mapping[fx.Node, Rows]) -> set[fx.Node]:
    """Cheap ops, row by row, that read what comes of a wide value and make what a wide value is made of.

    Left outside they would cut the region in two, and both ends would be whole.
    """

    after = _reached(large, lambda n: n.users, rows)
    return after & _reached(large, lambda n: n.all_input_nodes, rows)


def _reached(
    nodes: Iterable[fx.Node], beside: Callable[[fx.Node], Iterable[fx.Node]], rows: Mapping[fx.Node, Rows]
) -> set[fx.Node]:
    """What cheap ops, row by row, lead to."""
    found, stack = set[fx.Node](), list(nodes)
    while stack:
        new = {n for n in beside(stack.pop()) if n in rows and not rows[n].summed and is_cheap(n)} - found
        found |= new
        stack += new
    return found


def _narrowed(large: Collection[fx.Node], rows: Mapping[fx.Node, Rows]) -> set[fx.Node]:
    """What adapters make: values much smaller than the wide one that they are made of, on the way to another or to a
    sum over one.
    """
    sums = {n for n in rows if rows[n].summed and any(a in large for a in n.all_input_nodes)}
    found = set[fx.Node]()
    for node in rows:
        sizes = [_numbers(a) for a in node.all_input_nodes if a in large]
        if rows[node].summed or not is_tensor(node) or not sizes or NARROW * _numbers(node) > max(sizes):
            continue
        group = {node} | _reached([node], lambda n: n.users, rows) - set(large)
        if any(u in large or u in sums for n in group for u in n.users):
            found |= group
    return found


def _adds_up(
    node: fx.Node, large: Collection[fx.Node], candidates: Collection[fx.Node], rows: Mapping[fx.Node, Rows]
) -> bool:
    """Whether a node adds up over the tokens of a wide value, and has of each candidate the rows that a tile has."""
    operands = node.all_input_nodes
    if not rows[node].summed or not any(a in large for a in operands):
        return False
    return all(fusible(a, node, rows) for a in operands if a in candidates)


def fusible(source: fx.Node, reader: fx.Node, rows: Mapping[fx.Node, Rows]) -> bool:
    """Whether rows of `reader` are made of the rows of `source` that the same tile has."""
    if source in rows and rows[source].summed:
        return False
    needs = dict(zip(reader.all_input_nodes, rows[reader].needs, strict=True)) if reader in rows else {}
    return needs.get(source) is not None and needs[source] == rows[source].axis


def made_of(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """All that reads any of `nodes`, or what is made of them."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        new = set(stack.pop().users) - found
        found |= new
        stack += new
    return found


def _stages(gm: fx.GraphModule, candidates: Collection[fx.Node], rows: Mapping[fx.Node, Rows]) -> dict[fx.Node, int]:
    """For each node the number of borders before it; as large as its readers allow, so that it is one of theirs.

    A candidate that no other one reads stays with what it is made of. A sum goes where others read all that it adds up,
    and what is made for it alone, such as an operand of a weight's gradient, goes there, too.
    """

    def border(source: fx.Node, reader: fx.Node) -> bool:
        return source in candidates and not (reader in candidates and fusible(source, reader, rows))

    early: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        early[node] = max((early[a] + border(a, node) for a in node.all_input_nodes), default=0)
    stages = dict(early)
    for node in reversed(gm.graph.nodes):
        latest = min((stages[u] - border(node, u) for u in node.users), default=early[node])
        if node in candidates and rows[node].summed:
            beside = [[early[u] for u in a.users if not border(a, u)] for a in node.all_input_nodes if a in candidates]
            stages[node] = min(latest, max(early[node], min(map(max, beside), default=0)))
        elif node not in candidates or not all(border(node, u) for u in node.users):
            stages[node] = latest
    return stages


def _parts(
    candidates: Collection[fx.Node], stages: Mapping[fx.Node, int], rows: Mapping[fx.Node, Rows]
) -> Iterator[set[fx.Node]]:
    """Candidates of one stage that hang together."""
    remaining = set(candidates)
    while remaining:
        stack, part = [remaining.pop()], set[fx.Node]()
        while stack:
            node = stack.pop()
            part.add(node)
            beside = [a for a in node.all_input_nodes if a in remaining and fusible(a, node, rows)]
            beside += [u for u in node.users if u in remaining and fusible(node, u, rows)]
            for other in beside:
                if other in remaining and stages[other] == stages[node]:
                    remaining.discard(other)
                    stack.append(other)
        yield part


def _region(
    part: set[fx.Node],
    large: Collection[fx.Node],
    rows: Mapping[fx.Node, Rows],
    order: Mapping[fx.Node, int],
    taken: Collection[fx.Node],
    returned: Collection[fx.Node] | None,
) -> Region | None:
    """The region around a part, without nodes that another one has taken, and items of what is outside."""
    part = {n for n in part if n.target is not operator.getitem or n.all_input_nodes[0] in part}
    after = made_of(part) - part
    readers = {
        u for n in part & set(large) for u in n.users if u in rows and u not in part and u not in taken and is_tensor(u)
    }
    joining = {
        u for u in readers if all(fusible(a, u, rows) if a in part else a not in after for a in u.all_input_nodes)
    }
    sums = {u for u in part | joining if rows[u].summed}
    nodes = _without_views_at_the_end((part | joining) - sums, sums)
    within = nodes | sums

    def is_read(node: fx.Node) -> bool:
        outside = [u for u in node.users if u not in within]
        return any(u.op != "output" or returned is None or node in returned for u in outside)

    results = [n for n in nodes if is_read(n)]
    inside = [n for n in nodes if n in large and n not in results and _lies_alone(n) and not _is_source_of(n, results)]
    tokens = max((rows[n].axis.tokens for n in nodes), default=0)
    if not inside or any(not is_tensor(n) for n in results):
        return None
    key = order.__getitem__
    return Region(
        nodes=tuple(sorted(nodes, key=key)),
        sums=tuple(sorted(sums, key=key)),
        results=tuple(sorted(results, key=key)),
        rows=rows,
        tokens=tokens,
        inside=sum(nbytes(n) for n in inside),
    )


def _without_views_at_the_end(nodes: set[fx.Node], sums: Collection[fx.Node]) -> set[fx.Node]:
    """Without views that only others read, such as the heads of queries: what these lie in is the result."""
    nodes = set(nodes)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in nodes and is_view_of(node) and not any(u in nodes or u in sums for u in node.users):
            nodes.discard(node)
            stack += node.all_input_nodes
    return nodes


def _lies_alone(node: fx.Node) -> bool:
    return not is_view(node)


def _is_source_of(node: fx.Node, results: Collection[fx.Node]) -> bool:
    return any(storage_of(r) is node for r in results)
