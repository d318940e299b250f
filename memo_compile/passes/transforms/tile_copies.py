"""Lets what comes later make for itself what a region that runs tile by tile makes, where cheap ops can.

A normalized value is read on both sides of an attention's backward: by the projections that are made again before it,
and by their weights' gradients after it. Handed on it would lie there whole, all the while; made once more from what
lies there anyway, each tile has its own rows of it. The same holds for what no region makes and several read, such as a
constant, or a bias that is looked up for each pair of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch.fx as fx

from memo_compile.passes.analysis.bit_sensitive import decides
from memo_compile.passes.analysis.regions import Region, find_regions
from memo_compile.passes.analysis.token_axis import is_tensor
from memo_compile.passes.fx.facts import is_cheap, is_view, nbytes
from memo_compile.passes.transforms.slices import fetch
from memo_compile.passes.transforms.tile_bodies import operands_of

SMALL = 8  # what is smaller than a value by this factor may live longer for it


def make_again_in_tiles(gm: fx.GraphModule, wide: int) -> fx.GraphModule:
    """Let what reads wide results of cheap ops after their region make them once more, in a region of its own, and
    regions what they read of cheap ops that are in none.
    """
    regions = find_regions(gm, wide)
    places = _Places.of(gm, regions)
    left: dict[fx.Node, None] = {}
    for made in [*(region.results for region in regions), _read_in_rows(regions)]:
        cheap = [n for n in made if nbytes(n) >= wide and _can_run_again(n)]
        chains = {n: chain for n in cheap if (chain := places.chain(n, cheap)) is not None}
        longer = {source for chain in chains.values() for source in chain.longer}
        if sum(map(nbytes, longer)) >= sum(map(nbytes, chains)):
            chains = {n: chain for n, chain in chains.items() if not chain.longer}
        _copy({n: chain.nodes for n, chain in chains.items()}, places)
        left |= dict.fromkeys(n for chain in chains.values() for n in chain.nodes)
    for node in sorted(left, reverse=True):
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _read_in_rows(regions: Sequence[Region]) -> list[fx.Node]:
    """What no region makes and regions read row by row."""
    inside = {n for r in regions for n in r.nodes}
    read = (n for r in regions for n, axis in operands_of(r) if axis is not None)
    return list(dict.fromkeys(n for n in read if n not in inside))


@dataclass(frozen=True)
class _Chain:
    """The ops of a region that make a value, and what has to live longer for them to run again."""

    nodes: list[fx.Node]
    longer: frozenset[fx.Node]


def _can_run_again(node: fx.Node) -> bool:
    return is_cheap(node) and not decides(node)


@dataclass(frozen=True)
class _Places:
    """Where the nodes of a graph stand, which region has each (by number), and where that ends.

    Copies are entered as they are made.
    """

    order: dict[fx.Node, int]
    region: dict[fx.Node, int]
    ends: Sequence[int]

    @classmethod
    def of(cls, gm: fx.GraphModule, regions: Sequence[Region]) -> _Places:
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        nodes = [(*r.nodes, *r.sums) for r in regions]
        return cls(
            order,
            {n: i for i, of_region in enumerate(nodes) for n in of_region},
            [max(map(order.__getitem__, of_region)) for of_region in nodes],
        )

    def enter(self, copy: fx.Node, before: fx.Node, region: int) -> None:
        """Note where a copy stands, and its region, -1 for none."""
        self.order[copy] = self.order[before]
        self.region.update({copy: region} if region >= 0 else {})

    def later(self, node: fx.Node) -> list[fx.Node]:
        """What reads a region's result outside of it, or in a region what none makes."""
        return [u for u in node.users if self.region.get(u) != self.region.get(node)]

    def end(self, node: fx.Node) -> int:
        """Where a node has run, with its region or with what reads it as a view."""
        views = [self.end(u) for u in node.users] if is_view(node) else []
        return max([*views, self.ends[self.region[node]] if node in self.region else self.order[node]])

    def chain(self, node: fx.Node, cheap: Collection[fx.Node]) -> _Chain | None:
        """How a value is made of what is there, or small, until all its later readers have run; None where it is not,
        or nothing reads it later, or it is there itself.

        Saved values can live longer. What only `cheap` values' readers hold is not there: these may be made again.
        """
        readers = self.later(node)
        if not readers or any(u.op == "output" for u in readers):
            return None
        until, few = max(map(self.end, readers)), nbytes(node) // SMALL
        if any(u.op == "output" or self.end(u) >= until for u in set(node.users) - set(readers)):
            return None
        found, longer, stack = {node: None}, set[fx.Node](), list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            others = [u for u in source.users if u not in found and u not in cheap] if source not in cheap else []
            there = any(u.op == "output" or self.end(u) >= until for u in others)
            if source in found or there or (is_tensor(source) and nbytes(source) <= few):
                continue
            if _is_saved(source):
                longer.add(source)
                continue
            if not _can_run_again(source) or self.region.get(source) not in (None, self.region.get(node)):
                return None
            found[source] = None
            stack += source.all_input_nodes
        return _Chain(sorted(found), frozenset(longer))


def _is_saved(node: fx.Node) -> bool:
    """Whether a value was made before the graph, or comes back from the host."""
    return node.op == "placeholder" or node.target is fetch


def _copy(chains: Mapping[fx.Node, Sequence[fx.Node]], places: _Places) -> None:
    """Make values again, once for all readers of a region, and once for those in none."""
    readers = {n: places.later(n) for n in chains}
    groups: dict[int, list[tuple[fx.Node, fx.Node]]] = {}
    for node in chains:
        for reader in readers[node]:
            groups.setdefault(places.region.get(reader, -1), []).append((node, reader))
    for group, pairs in groups.items():
        for together in _at_once(pairs, chains):
            _copy_before(together, chains, places, group)


_Pairs = Sequence[tuple[fx.Node, fx.Node]]


def _at_once(pairs: _Pairs, chains: Mapping[fx.Node, Sequence[fx.Node]]) -> list[_Pairs]:
    """Pairs of a value and a reader whose copies are made at one place: all, where what these read is there by then."""
    first = min(reader for _, reader in pairs)
    made = {n for node, _ in pairs for n in chains[node]}
    if all(a < first for n in made for a in n.all_input_nodes if a not in made):
        return [pairs]
    return [[pair for pair in pairs if pair[0] is node] for node in dict.fromkeys(node for node, _ in pairs)]


def _copy_before(pairs: _Pairs, chains: Mapping[fx.Node, Sequence[fx.Node]], places: _Places, group: int) -> None:
    """Let readers read values that are made once more before the first of them."""
    first = min(reader for _, reader in pairs)  # of copies places are known roughly
    made: dict[fx.Node, fx.Node] = {}
    for source in sorted({n for node, _ in pairs for n in chains[node]}):
        with source.graph.inserting_before(first):
            made[source] = source.graph.node_copy(source, partial(_copied, made))
        places.enter(made[source], first, group)
    for node, reader in pairs:
        reader.replace_input_with(node, made[node])


def _copied(made: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return made.get(node, node)
