"""A prepared graph whose widest regions run tile by tile: what is large inside of them is not saved, and made again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch.fx as fx

from memo_compile.errors import DrawnTwice
from memo_compile.passes.analysis.bit_sensitive import deciding
from memo_compile.passes.analysis.costs import graph_costs
from memo_compile.passes.analysis.recompute_chains import recompute_chain, recompute_chains
from memo_compile.passes.analysis.regions import Region, find_regions
from memo_compile.passes.fx.facts import is_seed, nbytes
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.fx.mutations import readable_inputs
from memo_compile.passes.fx.ranges import has_symbols
from memo_compile.passes.pipeline import Tiling
from memo_compile.passes.transforms.attention import write_over_attention_inputs
from memo_compile.passes.transforms.partition import canonical_saved, order_backward, split_saving
from memo_compile.passes.transforms.row_gradients import add_rows_in_place
from memo_compile.passes.transforms.tile_bodies import Accumulate, bodies, operands_of
from memo_compile.passes.transforms.tiles import can_be_called, program_in
from memo_compile.planning.prepared import Prepared, results_of
from memo_compile.planning.problem import Limits

TILES = (4, 16, 64, 256)  # numbers of tiles to try, in turn
AS_WIDE = 8  # values of at least such a part of the widest are wide, too: its gradient, and what it is made of


def widest_of(p: Prepared) -> int:
    """Bytes of the widest value that has tokens."""
    return max(map(nbytes, _with_tokens(p)), default=0)


def wide_values(p: Prepared) -> frozenset[str]:
    """What tiles would make, by name: the wide values that have tokens."""
    wide = wide_in(p)
    return frozenset(n.name for n in _with_tokens(p) if nbytes(n) >= wide)


def _with_tokens(p: Prepared) -> list[fx.Node]:
    nodes = (*p.forward.graph.nodes, *p.backward.graph.nodes)
    return [n for n in nodes if TOKENS in n.meta and n.op == "call_function"]


def with_tiles(p: Prepared, limits: Limits) -> Prepared:
    """`p` as `limits.tiles` says, unless it is so already, or there is nothing to tile."""
    if p.tiling is not None or not isinstance(limits.tiles, int):
        return p
    return tiled(p, limits.tiles, limits.wide, limits.accumulate) or p


def wide_in(p: Prepared) -> int:
    """Bytes from which on values of `p` are wide: a part of the widest that no tile makes."""
    return max(1, widest_of(p) // AS_WIDE)


def tiled(p: Prepared, tiles: int, wide: int = 0, accumulate: Accumulate = "float32") -> Prepared | None:
    """`p` with regions around values of `wide` bytes in about `tiles` tiles; None where there is nothing to tile."""
    if tiles < 2 or not p.plannable or has_symbols(p.joint):
        return None
    tiling = Tiling(tiles, wide or wide_in(p), accumulate)
    if tiling not in p.tilings:
        p.tilings[tiling] = _tiled(p, tiling)
    return p.tilings[tiling]


def _tiled(p: Prepared, tiling: Tiling) -> Prepared | None:
    saved = _saved(p, tiling.wide)
    try:
        split = split_saving(p.joint, saved, p.num_forward_outputs)
    except DrawnTwice:
        return None
    interior = {n.name for region in _regions(split.forward, tiling.wide) for n in region.nodes}
    forward, backward = split.forward, order_backward(split.backward)
    if p.fused:  # regions are to know what lies in places that will be free
        write_over_attention_inputs(forward)
        write_over_attention_inputs(backward)
    exact = deciding(backward)
    costs = dict(graph_costs(p.joint, p.profile, fused=p.fused, written=saved))
    seconds = {k: c.seconds for k, c in costs.items()}
    tiling.applied(forward, backward, fused=p.fused)
    add_rows_in_place(backward)
    called = [n for n in (*forward.graph.nodes, *backward.graph.nodes) if program_in(n) is not None]
    if not called:
        return None
    for node in called:
        seconds[node.name] = _seconds(node, p)
    p.workspaces.annotate(forward)
    p.workspaces.annotate(backward)
    chains = recompute_chains(p.joint, saved, exact)
    return replace(
        p,
        saved=tuple(n for n in saved if n.name in split.saved or is_seed(n)),
        forward=forward,
        backward=backward,
        chains={k: None if c and any(n.name in interior for n in c) else c for k, c in chains.items()},
        seconds=seconds,
        tiling=tiling,
    )


def _saved(p: Prepared, wide: int) -> list[fx.Node]:
    """What is saved: nothing wide that a region makes, unless it is the user's too; and what regions are made of."""
    joint = {n.name: n for n in p.joint.graph.nodes}
    results = {n.name for n in results_of(p.forward, p.num_forward_outputs)}
    readable = readable_inputs(p.joint)
    dropped: set[str] = set()
    wanted: list[fx.Node] = []
    (output,) = p.forward.graph.find_nodes(op="output")
    for region in _regions(p.forward, wide, output.args[0][: p.num_forward_outputs]):
        if any(n.op == "placeholder" and joint[n.name] not in readable for n, _ in operands_of(region)):
            continue  # it is made of what the graph itself overwrites, as a buffer that is used and then updated
        dropped |= {n.name for n in region.nodes if nbytes(n) >= wide and n.name not in results}
        operands = [(joint[n.name], axis) for n, axis in operands_of(region) if n.name in joint]
        wanted += [n for n, axis in operands if axis is not None or not _is_of_parameters(n, readable)]
    kept = [n for n in p.saved if n.name not in dropped]
    recomputable = [n for n in wanted if n.op == "call_function" and n not in kept]
    return canonical_saved(p.joint, [*kept, *recomputable], p.policies)


def _is_of_parameters(node: fx.Node, readable: Collection[fx.Node]) -> bool:
    """Whether inputs without tokens make a value, and still do in the backward: no mean of tokens, no new buffer."""
    chain = recompute_chain(node, readable)
    return chain is not None and not any(TOKENS in a.meta for n in chain for a in (n, *n.all_input_nodes))


def _regions(gm: fx.GraphModule, wide: int, returned: Collection[fx.Node] | None = None) -> list[Region]:
    return [region for region in find_regions(gm, wide, returned) if can_be_called(region)]


def _seconds(node: fx.Node, p: Prepared) -> float:
    """Of all tiles: each costs what its body's ops do."""
    program = program_in(node)
    assert program is not None
    costs = {key: graph_costs(bodies()[key], p.profile, fused=p.fused) for key in program.kinds}
    each = {key: sum(c.seconds for c in found.values()) for key, found in costs.items()}
    body, tail = program.bodies
    return (len(program.tiles) - 1) * each[body] + each[tail]
