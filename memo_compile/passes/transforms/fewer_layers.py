"""A split with fewer of the layers that repeat, where many do: what one layer adds is asked of a few.

Layers [first, last) of a stack are taken out of both graphs. What reads across the gap then reads the same place in the
neighbour that is left: the layer after the gap reads what the one before it makes, and in the backward the layer before
it reads the gradients of the one after. Inputs stay, used or not, so that indices of inputs mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

from memo_compile.passes.analysis.layers import LayerInfo, LayerReport, annotate_layers
from memo_compile.passes.fx.facts import tensors
from memo_compile.passes.fx.meta import LAYER
from memo_compile.passes.transforms.partition import Split

MANY = 12  # layers of one class in a row: below that, looking at all takes no longer


@dataclass(frozen=True)
class _Place:
    """A node's place in its layer; the layer's forward and backward are counted by themselves."""

    layer: int
    position: int
    backward: bool


class _NoCut(Exception):
    """Something reads into a layer that is taken out, and no other value stands for what it reads."""


@dataclass(frozen=True)
class NamedLayers:
    """The layers of a joint graph before it was rewritten: the classes, and each node's layer by its name."""

    report: LayerReport
    infos: Mapping[str, LayerInfo]

    @property
    def deepest(self) -> int:
        """Layers in the longest stack."""
        return len(self.stack)

    @property
    def stack(self) -> range:
        """The longest stack."""
        return max(self.report.stacks(), key=len, default=range(0))


def named_layers(joint: fx.GraphModule) -> NamedLayers:
    """Find the layers of a joint graph; of the nodes of its split the names are the same."""
    report = annotate_layers(joint)
    return NamedLayers(report, {n.name: n.meta[LAYER] for n in joint.graph.nodes if LAYER in n.meta})


def with_fewer_layers(split: Split, layers: NamedLayers, left: int) -> Split | None:
    """A split without the middle of its longest stack, of which `left` layers stay.

    `split` is not changed. None where the stack is short, or where something else reads what lies in it.
    """
    stack = layers.stack
    if len(stack) < MANY:
        return None
    gap = range(stack.start + left // 2, stack.stop - (left - left // 2))
    forward, backward = _copy(split.forward), _copy(split.backward)
    places = _places(split, layers.infos)
    try:
        front = _without(forward, places, gap)
        back = _without(backward, places, gap)
    except _NoCut:
        return None
    (made,), (given,) = (g.graph.find_nodes(op="output") for g in (forward, backward))
    outputs, count = list(made.args[0]), split.num_forward_outputs
    if any(n in front for n in outputs[:count]):
        return None
    kept = [n for n in outputs[count:] if n not in front]
    gone = {n.name for n in outputs[count:] if n in front}
    made.args = ((*outputs[:count], *kept),)
    given.args = (tuple(None if n in back else n for n in given.args[0]),)
    _erase(forward, front)
    _erase(backward, back)
    return replace(split, forward=forward, backward=backward, saved=tuple(n for n in split.saved if n not in gone))


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, {})
    graph.output(result)
    (theirs,), (ours,) = (g.find_nodes(op="output") for g in (gm.graph, graph))
    ours.meta = dict(theirs.meta)
    return fx.GraphModule(gm, graph)


def _places(split: Split, infos: Mapping[str, LayerInfo]) -> dict[str, _Place]:
    of_forward = {n.name for n in split.forward.graph.nodes}
    return {name: _Place(i.index, i.position, name not in of_forward) for name, i in infos.items()}


def _without(gm: fx.GraphModule, places: Mapping[str, _Place], gap: range) -> set[fx.Node]:
    """Let what stays read what stays; returns what is to go.

    Raises:
        _NoCut: something that stays reads what has nothing in its place.
    """
    nodes = list(gm.graph.nodes)
    gone = {n for n in nodes if n.name in places and places[n.name].layer in gap}
    at = {places[n.name]: n for n in nodes if n.name in places}
    before: set[fx.Node] = set()
    for node in nodes:
        across = gone.intersection(node.all_input_nodes) if node not in gone and node.op != "output" else ()
        for argument in across:
            other = _neighbour(argument, places, at, gap)
            if other not in before:
                raise _NoCut
            node.replace_input_with(argument, other)
        before.add(node)
    return gone


def _neighbour(node: fx.Node, places: Mapping[str, _Place], at: Mapping[_Place, fx.Node], gap: range) -> fx.Node:
    place = places[node.name]
    if place.layer not in (gap[0], gap[-1]):
        raise _NoCut
    other = at.get(replace(place, layer=gap.start - 1 if place.layer == gap[-1] else gap.stop))
    if other is None or (other.target != node.target and other.op == node.op == "call_function"):
        raise _NoCut
    if [_layout(t) for t in tensors(other)] != [_layout(t) for t in tensors(node)]:
        raise _NoCut
    return other


def _layout(value: Any) -> tuple[Any, ...]:
    return tuple(value.shape), tuple(value.stride()), value.dtype


def _erase(gm: fx.GraphModule, gone: set[fx.Node]) -> None:
    for node in reversed(list(gm.graph.nodes)):
        if node in gone:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
