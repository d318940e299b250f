"""What stands in the way of a smaller plan: the largest values that live when its graphs hold most."""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx as fx

from memo_compile.passes.analysis.liveness import LiveRange, lifetimes
from memo_compile.passes.fx.facts import op_name, source_line
from memo_compile.passes.fx.meta import FOR

MOST = 6


def peak_tensors(
    forward: fx.GraphModule, backward: fx.GraphModule, saved: frozenset[str], makers: Mapping[str, fx.Node], fused: bool
) -> tuple[str, ...]:
    """The largest values of the worst moment, in words, with the source lines that make them.

    Args:
        saved: names of the backward's inputs that are memo's to free.
        makers: nodes of the joint graph by name, for the lines of what the backward is given.
    """
    sides = [
        (forward, lifetimes(forward, fused=fused)),
        (backward, lifetimes(backward, fused=fused, owned_inputs=saved)),
    ]
    graph, lives = max(sides, key=lambda side: max(side[1].live_bytes(), default=0))
    held = lives.live_bytes()
    if not held:
        return ()
    at = held.index(max(held))
    nodes = {n.name: n for n in graph.graph.nodes}
    live = sorted((r for r in lives.ranges.values() if r.start <= at < r.end), key=lambda r: (-r.bytes, r.name))
    words = [(r.bytes, _in_words(r, nodes[r.name], makers)) for r in live[:MOST]]
    if at in lives.workspaces:
        size, node = lives.workspaces[at], list(graph.graph.nodes)[at]
        where = source_line(node)
        words.append((size, f"{node.name}: {size:,} bytes for itself, {op_name(node)}{', ' + where if where else ''}"))
    return tuple(text for _, text in sorted(words, key=lambda w: -w[0])[:MOST])


def _in_words(live: LiveRange, node: fx.Node, makers: Mapping[str, fx.Node]) -> str:
    name = node.meta.get(FOR) or live.name  # of a prefetch buffer, what lands there
    maker = makers.get(name, node)
    where = source_line(maker)
    return f"{name}: {live.bytes:,} bytes, {op_name(maker)}{', ' + where if where else ''}"
