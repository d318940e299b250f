"""From a trace of a few layers to the program of many: one layer's steps and activations are repeated.

A layer in the middle of a stack is the template. Copies of its forward stand after it, copies of its backward before
it, so that the copies, in the forward's order, are one stack with the traced layers. All that crosses from layer to
layer (the residual stream, gradients) does so between neighbouring copies as it did in the trace. Gradients of weights
are left out of the timeline but for the step that makes them: they are counted by formula (`forecast/parallel.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.fx as fx

from memo_compile.errors import NothingToPlan
from memo_compile.passes.analysis.layers import LayerInfo, LayerReport, annotate_layers
from memo_compile.passes.fx.facts import nbytes, storage_of
from memo_compile.passes.fx.meta import LAYER
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import Limits, View, view_of
from memo_compile.planning.residency import Activation

T = TypeVar("T")


@dataclass(frozen=True)
class Long:
    """A view of many layers.

    `template` names the traced activation that each is a copy of, `layer` the layer in which it is made; `classes` are
    the layers'. `period` says which steps were repeated; None where none were.
    """

    view: View
    template: Mapping[str, str]
    layer: Mapping[str, int | None]
    classes: tuple[int, ...]
    forward_flops: float
    flops: float
    period: Period | None = None


@dataclass(frozen=True)
class Period:
    """The template's steps: forward [start, stop), backward [back_start, back_stop), over the whole timeline.

    `layer` is the template's index, `extra` the number of copies.
    """

    start: int
    stop: int
    back_start: int
    back_stop: int
    extra: int
    layer: int

    @property
    def forward(self) -> int:
        return self.stop - self.start

    @property
    def backward(self) -> int:
        return self.back_stop - self.back_start


def lengthened(p: Prepared, limits: Limits, layers: int) -> Long:
    """The linear program's view of a model with `layers` layers, from a trace of at least four; 0: of those traced.

    Raises:
        NothingToPlan: the trace has other layers than are asked for, and no four of one kind in a row.
    """
    report = annotate_layers(p.joint)
    infos = {n.name: n.meta[LAYER] for n in p.joint.graph.nodes if LAYER in n.meta}
    view = view_of(p, limits)
    view = replace(view, problem=replace(view.problem, base_bytes=_without_gradients(p, view.problem.base_bytes)))
    flops = [
        float(p.flops.get(n.name, 0)) if n.op == "call_function" else 0.0 for g in _graphs(p) for n in g.graph.nodes
    ]
    extra = layers - len(report.classes) if layers else 0
    steps = view.problem.forward_steps
    if extra <= 0:
        layer = {name: infos[name].index if name in infos else None for name in view.order}
        return Long(
            view=view,
            template={n: n for n in view.order},
            layer=layer,
            classes=report.classes,
            forward_flops=sum(flops[:steps]),
            flops=sum(flops),
        )
    middle = _middle(report)
    period = _period(p, infos, middle, extra)
    copies = _repeated_activations(view, infos, period, middle)
    longer = replace(
        view.problem,
        seconds=tuple(_repeated(view.problem.seconds, period)),
        base_bytes=tuple(_repeated(view.problem.base_bytes, period)),
        forward_steps=steps + extra * period.forward,
    )
    long_flops = _repeated(flops, period)
    made = View(
        order=tuple(copies.activations),
        activations=copies.activations,
        needs=copies.needs,
        axes={name: view.axes[copies.template[name]] for name in copies.activations},
        problem=longer,
    )
    classes = (*report.classes[:middle], *[report.classes[middle]] * extra, *report.classes[middle:])
    forward_flops = sum(long_flops[: longer.forward_steps])
    return Long(
        view=made,
        template=copies.template,
        layer=copies.layer,
        classes=classes,
        forward_flops=forward_flops,
        flops=sum(long_flops),
        period=period,
    )


def _graphs(p: Prepared) -> tuple[fx.GraphModule, fx.GraphModule]:
    return p.forward, p.backward


def _without_gradients(p: Prepared, base: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes of each step, gradients counted in the step that makes them and no longer."""
    kept = list(base)
    first = len(list(p.forward.graph.nodes))
    place = {n: first + i for i, n in enumerate(p.backward.graph.nodes)}
    (output,) = p.backward.graph.find_nodes(op="output")
    for node in {storage_of(n) for n in output.args[0] if isinstance(n, fx.Node) and n.op == "call_function"}:
        for step in range(place[node] + 1, len(kept)):
            kept[step] -= nbytes(node)
    return tuple(kept)


def _middle(report: LayerReport) -> int:
    """The template: the second layer of the longest stack."""
    stack = max(report.stacks(), key=len, default=range(0))
    if len(report.classes) < 4 or len(stack) < 2:
        raise NothingToPlan(
            f"the trace shows {len(report.classes)} layers, of which {len(stack)} in a row are alike: "
            "too few to tell what more of them would take. Trace all layers (--trace-layers)."
        )
    return max(1, min(stack[1] if stack[0] == 0 else stack[0], len(report.classes) - 2))


def _period(p: Prepared, infos: Mapping[str, LayerInfo], middle: int, extra: int) -> Period:
    forward, backward = (list(g.graph.nodes) for g in _graphs(p))
    of_forward = {n.name for n in forward}

    def first(nodes: list[fx.Node], index: int, counts: Callable[[fx.Node], bool]) -> int:
        return next(i for i, n in enumerate(nodes) if n.name in infos and infos[n.name].index == index and counts(n))

    def is_gradient(node: fx.Node) -> bool:
        return node.op == "call_function" and node.name not in of_forward

    def is_call(node: fx.Node) -> bool:
        return node.op == "call_function"

    steps = len(forward)
    return Period(
        start=first(forward, middle, is_call),
        stop=first(forward, middle + 1, is_call),
        back_start=steps + first(backward, middle, is_gradient),
        back_stop=steps + first(backward, middle - 1, is_gradient),
        extra=extra,
        layer=middle,
    )


def _repeated(row: tuple[T, ...] | list[T], p: Period) -> list[T]:
    once = list(row)
    return [
        *once[: p.stop],
        *(once[p.start : p.stop] * p.extra),
        *once[p.stop : p.back_start],
        *(once[p.back_start : p.back_stop] * p.extra),
        *once[p.back_start :],
    ]


def repeated_ranges(start: int, end: int, p: Period) -> list[tuple[int, int, int]]:
    """(copy, start, end) of each copy of a live range [start, end) of the trace, on the long timeline.

    What the template makes is made by every copy. What comes from elsewhere is there once: made before the template, it
    reaches into the template itself, the first of the copies; made after it, into the last, which runs backward first.
    """
    on, back = p.forward * p.extra, p.backward * p.extra
    if p.start <= start < p.stop:
        return [
            (c, start + p.forward * c, end + (p.forward * c if end <= p.back_start else on + back - p.backward * c))
            for c in range(p.extra + 1)
        ]
    if p.back_start <= start < p.back_stop:
        return [(c, start + on + back - p.backward * c, end + on + back - p.backward * c) for c in range(p.extra + 1)]

    def at(step: int, turn: int) -> int:
        return step + (on if step >= p.stop else 0) + (back if step >= turn else 0)

    return [(0, at(start, p.back_start), at(end - 1, p.back_start if start < p.stop else p.back_stop) + 1)]


@dataclass(frozen=True)
class _Copies:
    activations: dict[str, Activation]
    needs: dict[str, tuple[str, ...]]
    template: dict[str, str]
    layer: dict[str, int | None]


def _repeated_activations(view: View, infos: Mapping[str, LayerInfo], p: Period, middle: int) -> _Copies:
    index = {name: infos[name].index if name in infos else None for name in view.order}
    own = [name for name in view.order if p.start <= view.activations[name].produced < p.stop]
    before = [n for n in view.order if index[n] == middle - 1]
    # The same place in the layer before, counted from its end: the first layer may lack what the others begin with.
    successor = dict(zip(reversed(before), reversed(own), strict=False))
    copies = _Copies({}, {}, {}, {})

    def add(name: str, copy: int, activation: Activation, needs: tuple[str, ...]) -> None:
        new = _copy_name(name, copy)
        copies.activations[new] = replace(activation, name=new)
        copies.needs[new] = needs
        copies.template[new] = name
        layer = index[name]
        copies.layer[new] = None if layer is None else layer + (copy if name in own else p.extra * (layer > middle))

    def needed_by(copy: int, source: str) -> str:
        if source in own:
            return _copy_name(source, copy)
        return _copy_name(successor[source], copy - 1) if copy and source in successor else source

    for name in view.order:
        if name == (own[0] if own else None):
            for copy in range(p.extra + 1):
                for n in own:
                    needs = tuple(needed_by(copy, s) for s in view.needs[n])
                    add(n, copy, _moved(view.activations[n], p, copy), needs)
        if name not in own:
            after = view.activations[name].produced >= p.stop
            needs = tuple(_copy_name(s, p.extra if after else 0) if s in own else s for s in view.needs[name])
            add(name, 0, _stretched(view.activations[name], p), needs)
    return copies


def _copy_name(name: str, copy: int) -> str:
    return f"{name}+{copy}" if copy else name


def _moved(a: Activation, p: Period, copy: int) -> Activation:
    """Copy number `copy` of one of the template's activations: later in the forward, earlier in the backward."""
    on, back = p.forward * copy, p.forward * p.extra + p.backward * (p.extra - copy)
    return replace(
        a,
        produced=a.produced + on,
        last_forward=a.last_forward + on,
        first_backward=a.first_backward + back,
        last_backward=a.last_backward + back,
        unread=tuple((begin + back, end + back) for begin, end in a.unread),
    )


def _stretched(a: Activation, p: Period) -> Activation:
    """Another layer's activation, around the copies."""

    def at(step: int) -> int:
        step_on = step + (p.forward * p.extra if step >= p.stop else 0)
        return step_on + (p.backward * p.extra if step >= p.back_start else 0)

    return replace(
        a,
        produced=at(a.produced),
        last_forward=at(a.last_forward),
        first_backward=at(a.first_backward),
        last_backward=at(a.last_backward),
        unread=tuple((at(begin), at(end)) for begin, end in a.unread),
    )
