"""Finds the layers that repeat, from the graph alone: no module paths, no names.

The forward is read as a row of labels (op, shapes, integers). A stack of layers is a stretch of that row that equals
itself moved by a period. Any rotation of the period repeats as well: layers are cut where the fewest bytes cross, which
is the residual stream in a transformer. A copy next to the stack that holds a few nodes more (T5's first layer makes
the position bias for all) counts as a layer of a class of its own. The backward follows from what it reads: a gradient
belongs to the layer whose values it needs.

Writes `node.meta["memo_layer"]`. Linear in the number of nodes, but for the number of periods that are tried.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch.fx as fx

from memo_compile.passes.fx.facts import is_pointwise, is_reduction, is_view, nbytes, storage_of, tensors
from memo_compile.passes.fx.meta import LAYER

PERIODS = 48  # candidates tried: the distances that equal labels are most often apart
SMALLEST = 4  # nodes: a shorter repeat is no layer
REPEATED = 0.25  # of a period must equal the next one in one piece; the rest may be a variant's
INSERTED = 0.5  # of a period: nodes that a variant may hold beyond it
WIDE = 1.5  # periods: a value that lives longer (a mask, a table, an encoder's output) bounds no layer

Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class LayerInfo:
    """Where a node stands: in which layer (counted from the inputs on), of which class, at which place in it.

    Layers of one class have the same forward, node by node: equal `position` means the same op on the same shapes.
    Backward nodes are counted by themselves, from 0 in each layer, in the order of the backward.
    """

    index: int
    cls: int
    position: int


@dataclass(frozen=True)
class LayerReport:
    """The class of each layer, in the forward's order; empty where nothing repeats."""

    classes: tuple[int, ...]

    def stacks(self) -> list[range]:
        """Maximal runs of layers of one class.

        >>> LayerReport((0, 1, 1, 2, 2)).stacks()
        [range(0, 1), range(1, 3), range(3, 5)]
        """
        starts = [i for i, c in enumerate(self.classes) if i == 0 or self.classes[i - 1] != c]
        return [range(a, b) for a, b in pairwise([*starts, len(self.classes)])]


@dataclass(frozen=True)
class _Span:
    """One layer: the forward's nodes [start, end), and the labels that make its class."""

    start: int
    end: int


def annotate_layers(gm: fx.GraphModule) -> LayerReport:
    """Find repeating layers in a forward or joint graph, and write `LayerInfo` to their nodes."""
    for node in gm.graph.nodes:
        node.meta.pop(LAYER, None)
    forward, backward = _halves(gm)
    labels = _labels(forward)
    spans = sorted(_spans(_row(forward, labels)), key=lambda s: s.start)
    known: dict[bytes, int] = {}
    classes = tuple(known.setdefault(labels[s.start : s.end].tobytes(), len(known)) for s in spans)
    for index, span in enumerate(spans):
        for position, node in enumerate(forward[span.start : span.end]):
            node.meta[LAYER] = LayerInfo(index, classes[index], position)
    _annotate_backward(gm, forward, backward, spans, classes)
    return LayerReport(classes)


def _halves(gm: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls before and from the first that reads a gradient on."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    tangents = {n for n in gm.graph.find_nodes(op="placeholder") if "tangents" in str(n.target)}
    for i, node in enumerate(calls):
        if tangents.intersection(node.all_input_nodes):
            return calls[:i], calls[i:]
    return calls, []


def _labels(nodes: Sequence[fx.Node]) -> Labels:
    known: dict[Any, int] = {}
    return np.array([known.setdefault(_label(n), len(known)) for n in nodes], dtype=np.int64)


def _label(node: fx.Node) -> tuple[Any, ...]:
    """What makes two nodes alike: the op, all shapes, integer arguments. Floats (a dropout rate) do not matter."""
    seed = "lookup_seed" in str(node.target)  # its integer counts the draws
    shapes = tuple((tuple(v.shape), v.dtype) for v in tensors(node))
    inputs = tuple((tuple(v.shape), v.dtype) for a in node.all_input_nodes for v in tensors(a))
    return str(node.target), shapes, inputs, () if seed else _constants((node.args, node.kwargs))


def _constants(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_constants(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _constants(v)) for k, v in value.items())
    if isinstance(value, fx.Node):
        return "node"
    return "float" if isinstance(value, float) else str(value)


# Stacks.


@dataclass(frozen=True)
class _Row:
    """The forward as a row: labels, which nodes are more than bookkeeping, values as (made, last read, bytes), and
    the places of the nodes that each reads."""

    labels: Labels
    does_work: np.ndarray[Any, Any]
    values: Labels
    reads: tuple[tuple[int, ...], ...]


def _row(nodes: Sequence[fx.Node], labels: Labels) -> _Row:
    place = {n: i for i, n in enumerate(nodes)}
    does_work = np.array([not (is_view(n) or is_pointwise(n) or is_reduction(n)) for n in nodes], dtype=bool)
    reads = tuple(tuple(place[a] for a in n.all_input_nodes if a in place) for n in nodes)
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        last.update((s, i) for a in node.all_input_nodes if (s := storage_of(a)) in place)
    values = np.array([(place[s], end, nbytes(s)) for s, end in last.items()], dtype=np.int64).reshape(-1, 3)
    return _Row(labels, does_work, values, reads)


def _spans(row: _Row) -> list[_Span]:
    """The layers of all stacks: the longest stack first, then what lies before and after it."""
    found: list[_Span] = []
    open_ranges = [(0, len(row.labels))]
    while open_ranges:
        lo, hi = open_ranges.pop()
        layers = _longest_stack(row, lo, hi)
        if layers:
            found += layers
            open_ranges += [(lo, layers[0].start), (layers[-1].end, hi)]
    return found


def _longest_stack(row: _Row, lo: int, hi: int) -> list[_Span]:
    """The layers that cover most of [lo, hi); of equals, those with the smallest period."""
    best: list[_Span] = []
    for period in sorted(_periods(row.labels, lo, hi)):
        start, length = _longest_run(row.labels, lo, hi, period)
        if length < REPEATED * period or not row.does_work[start : start + period].any():
            continue
        layers = _cut(row=row, start=start, end=start + length + period, period=period, lo=lo, hi=hi)
        if len(layers) > 1 and _covered(layers) > _covered(best) and _chained(row, layers):
            best = layers
    return best


def _covered(layers: Sequence[_Span]) -> int:
    return layers[-1].end - layers[0].start if layers else 0


def _chained(row: _Row, layers: Sequence[_Span]) -> bool:
    """Whether each layer reads the one before: three projections of one input repeat, and are no layers."""
    return all(
        any(before.start <= source < before.end for reads in row.reads[layer.start : layer.end] for source in reads)
        for before, layer in pairwise(layers)
    )


def _periods(labels: Labels, lo: int, hi: int) -> list[int]:
    """Distances between occurrences of equal labels, the most frequent first."""
    counts: Counter[int] = Counter()
    last: dict[int, int] = {}
    for i, label in enumerate(labels[lo:hi].tolist()):
        if label in last:
            counts[i - last[label]] += 1
        last[label] = i
    return [d for d, _ in counts.most_common() if d >= SMALLEST][:PERIODS]


def _longest_run(labels: Labels, lo: int, hi: int, period: int) -> tuple[int, int]:
    """Start and length of the longest stretch that equals itself `period` later."""
    equal = np.concatenate(([False], labels[lo : hi - period] == labels[lo + period : hi], [False]))
    edges = np.flatnonzero(equal[1:] != equal[:-1])
    if not len(edges):
        return lo, 0
    starts, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - starts))
    return lo + int(starts[longest]), int(ends[longest] - starts[longest])


def _cut(row: _Row, start: int, end: int, period: int, lo: int, hi: int) -> list[_Span]:
    """Cut the periodic stretch [start, end) into layers where the fewest bytes cross.

    Of several such rotations the one with most layers is taken, and of those the one with the fewest nodes too many.
    """
    crossing = _crossing_bytes(row, period)[start : start + period]
    best: list[_Span] = []
    for first in start + np.flatnonzero(crossing == crossing.min()):
        layers = [_Span(i, i + period) for i in range(int(first), end - period + 1, period)]
        if not layers:
            continue
        pattern = row.labels[first : first + period]
        before = _variant(row.labels[lo:first][::-1], pattern[::-1])
        if before is not None:
            layers.insert(0, _Span(int(first) - before, int(first)))
        last = layers[-1].end
        after = _variant(row.labels[last:hi], pattern)
        if after is not None:
            layers.append(_Span(last, last + after))
        if (len(layers), -_covered(layers)) > (len(best), -_covered(best)):
            best = layers
    return best


def _variant(labels: Labels, pattern: Labels) -> int | None:
    """How many labels, from the first on, hold `pattern` in order with a few others between; None if they do not."""
    allowed, at = len(pattern) + int(INSERTED * len(pattern)), 0
    for label in pattern:
        while at < min(len(labels), allowed) and labels[at] != label:
            at += 1
        if at >= min(len(labels), allowed):
            return None
        at += 1
    return at


def _crossing_bytes(row: _Row, period: int) -> Labels:
    """Bytes of the values made before each place and read from there on, wide ones left out."""
    made, last, size = row.values[row.values[:, 1] - row.values[:, 0] <= WIDE * period].T
    change = np.zeros(len(row.labels) + 2, dtype=np.int64)
    np.add.at(change, made + 1, size)
    np.subtract.at(change, last + 1, size)
    return np.cumsum(change)[: len(row.labels)]


# The backward.


def _annotate_backward(
    gm: fx.GraphModule,
    forward: Sequence[fx.Node],
    backward: Sequence[fx.Node],
    spans: Sequence[_Span],
    classes: Sequence[int],
) -> None:
    """The layers run backward, so that the current one only ever falls: to the last that uses a value that is read."""
    edges = sorted({e for s in spans for e in (s.start, s.end)})
    layer_of = {bisect_right(edges, s.start): index for index, s in enumerate(spans)}
    region = {n: bisect_right(edges, i) for i, n in enumerate(forward)}
    used_last = dict(region)
    for node in forward:
        for argument in node.all_input_nodes:
            used_last[argument] = max(used_last.get(argument, 0), region[node])
    current = len(edges)
    counts: Counter[int] = Counter()
    for node in backward:
        # A constant is no layer's, wherever its first use has put it.
        reads = [used_last[a] for a in node.all_input_nodes if a in used_last and a.all_input_nodes]
        current = min([current, *([max(reads)] if reads else [])])
        index = layer_of.get(current)
        if index is not None:
            node.meta[LAYER] = LayerInfo(index, classes[index], counts[index])
            counts[index] += 1
