"""What a forecast shows line by line: the residency of layer classes and of their tensors, and the largest tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch.fx as fx

from memo_compile.forecast.repeat_layers import Long
from memo_compile.passes.analysis.liveness import reaches_memory
from memo_compile.passes.fx.facts import is_view, nbytes, op_name, source_line
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.residency import Activation, Decision, Problem

LARGEST = 8  # tensors named in a report


@dataclass(frozen=True)
class ResidencyRow:
    """Bytes of activations in each home; of a layer class, or of one tensor of its layers."""

    label: str
    layers: int
    bytes: int
    kept: int
    offloaded: int
    recomputed: int
    source: str = ""


@dataclass(frozen=True)
class LargeTensor:
    """One of the largest values of the graph. `quadratic` where two of its dimensions count tokens."""

    name: str
    op: str
    shape: tuple[int, ...]
    bytes: int
    source: str
    quadratic: bool


def _op(node: fx.Node) -> str:
    """The op that makes a value, tuples' items named after what makes the tuple."""
    return op_name(maker_of(node))


def maker_of(node: fx.Node) -> fx.Node:
    """The node that makes a value: of a tuple's item, what makes the tuple."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def residency_rows(
    p: Prepared, long: Long, problem: Problem, decision: Decision
) -> tuple[tuple[ResidencyRow, ...], tuple[ResidencyRow, ...]]:
    """By layer class, and by tensor in the class that holds most."""
    nodes = {n.name: n for n in p.saved}
    by_class: dict[int | None, list[Activation]] = {}
    for a in problem.activations:
        layer = long.layer[a.name]
        by_class.setdefault(None if layer is None else long.classes[layer], []).append(a)
    classes = [
        _row_of(_class_label(long, cls), 0 if cls is None else long.classes.count(cls), members, decision)
        for cls, members in sorted(by_class.items(), key=lambda item: (item[0] is None, item[0] or 0))
    ]
    in_layers = {cls: members for cls, members in by_class.items() if cls is not None}
    if not in_layers:
        return tuple(classes), ()
    largest = max(in_layers, key=lambda cls: sum(a.bytes for a in in_layers[cls]))
    by_tensor: dict[tuple[int, str], list[Activation]] = {}
    for members in _by_layer(long, in_layers[largest]):
        for i, a in enumerate(members):
            by_tensor.setdefault((i, str(tuple(_shape(nodes[long.template[a.name]])))), []).append(a)
    return tuple(classes), tuple(
        _row_of(
            f"{_op(nodes[long.template[members[0].name]])} {shape}",
            len(members),
            members,
            decision,
            source_line(nodes[long.template[members[0].name]]),
        )
        for (_, shape), members in by_tensor.items()
    )


def _by_layer(long: Long, members: Sequence[Activation]) -> list[list[Activation]]:
    by_layer: dict[int, list[Activation]] = {}
    for a in members:
        by_layer.setdefault(long.layer[a.name] or 0, []).append(a)
    return [by_layer[layer] for layer in sorted(by_layer)]


def _class_label(long: Long, cls: int | None) -> str:
    if cls is None:
        return "outside the layers"
    places = [i for i, c in enumerate(long.classes) if c == cls]
    if len(places) == 1:
        return f"layer {places[0]}"
    contiguous = places[-1] - places[0] + 1 == len(places)
    return f"layers {places[0]} to {places[-1]}" if contiguous else f"{len(places)} layers from {places[0]} on"


def _row_of(
    label: str, layers: int, members: Sequence[Activation], decision: Decision, source: str = ""
) -> ResidencyRow:
    kept = offloaded = recomputed = 0
    for a in members:
        home = decision.residency[a.name]
        kept += a.bytes * home.kept // a.tokens
        offloaded += a.bytes * home.offloaded // a.tokens
        recomputed += a.bytes * home.recomputed // a.tokens
    return ResidencyRow(
        label=label,
        layers=layers,
        bytes=sum(a.bytes for a in members),
        kept=kept,
        offloaded=offloaded,
        recomputed=recomputed,
        source=source,
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


def largest_tensors(p: Prepared) -> tuple[LargeTensor, ...]:
    """The largest values of the graph as traced, one for each op and shape that a source line makes."""
    found: dict[tuple[str, str, tuple[int, ...]], LargeTensor] = {}
    for node in (n for g in (p.forward, p.backward) for n in g.graph.nodes if n.op == "call_function"):
        if not nbytes(node) or is_view(node) or (p.fused and not reaches_memory(node)):
            continue
        shape, source = _shape(node), source_line(node)
        quadratic = p.tokens.tokens > 1 and sum(1 for s in shape if s >= p.tokens.tokens) > 1
        found.setdefault(
            (op_name(node), source, shape),
            LargeTensor(
                name=node.name, op=op_name(node), shape=shape, bytes=nbytes(node), source=source, quadratic=quadratic
            ),
        )
    return tuple(sorted(found.values(), key=lambda t: (-t.bytes, not t.quadratic, t.name))[:LARGEST])
