"""What a report shows, as plain data: every tensor of the timeline before and after, the arena, the streams.

`before` is the graph as torch would split it. `after` is the plan as it was emitted where there is emitted code, and
else as its graphs say. A timeline's steps are the forward's, then the backward's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import IntEnum
from typing import Any

import torch
import torch.fx as fx

from memo_compile.codegen.emitted.body import Body, Kind
from memo_compile.hardware.profiles import is_calibrated
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.fx.facts import op_name, source_line, storage_of
from memo_compile.passes.fx.meta import FOR, LAYER, PART_OF, ROLE, WHY, Role
from memo_compile.passes.transforms.residency import Residency
from memo_compile.placement import Buffer, place
from memo_compile.placement.bounds import live_bytes
from memo_compile.planning.decide import Decided
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.simulate import Simulation, simulate
from memo_compile.schema import Plan, Side

REPORT_VERSION = 1


class Category(IntEnum):
    """What a tensor is, in the order in which a report stacks them."""

    OUTPUT = 0
    KEPT = 1
    OFFLOADED = 2
    FORWARD_TRANSIENT = 3
    PREFETCHED = 4
    RECOMPUTED = 5
    BACKWARD_TRANSIENT = 6
    GRADIENT = 7
    KERNEL = 8

    @property
    def transient(self) -> bool:
        """Whether it is born and dead within one pass."""
        return self in (Category.FORWARD_TRANSIENT, Category.BACKWARD_TRANSIENT)


# A category's words, in their order.
CATEGORIES = (
    "output",
    "kept activation",
    "offloaded activation",
    "forward transient",
    "prefetched",
    "recomputed",
    "backward transient",
    "gradient",
    "kernel",
)


class _Strings:
    """A table of strings; rows refer to it by index."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index))


def report_data(p: Prepared, decided: Decided, plan: Plan, emitted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that the report of one graph shows.

    Args:
        emitted: the arguments of `codegen.arena.layout.plan_arena`, where Inductor emitted the graphs.
    """
    strings = _Strings()
    facts = _Facts(p, decided.residency, strings)
    unplanned = p.unplanned
    before = _graph_timeline(unplanned.forward, unplanned.backward, unplanned.saved, p, _Facts(p, {}, strings))
    if emitted is not None:
        after = _emitted_timeline(decided, emitted, plan, facts)
    else:
        after = _graph_timeline(decided.forward, decided.backward, decided.saved, p, facts)
    return {
        "version": REPORT_VERSION,
        "plan": {k: v for k, v in asdict(plan).items() if k not in ("activations", "buffers", "segments")},
        "totals": {"kept": plan.kept_bytes, "offloaded": plan.offloaded_bytes, "recomputed": plan.recomputed_bytes},
        "calibrated": is_calibrated(p.profile),
        "categories": CATEGORIES,
        "before": before,
        "after": after,
        "segments": _segments(plan),
        "activations": [_activation(a, strings) for a in plan.activations],
        "layers": list(p.layers.classes),
        "streams": _streams(simulated(p, decided)),
        "strings": list(strings.index),
    }


def _activation(a: Any, strings: _Strings) -> list[Any]:
    shape = f"{a.dtype}[{','.join(map(str, a.shape))}]"
    rows = [a.tokens, a.kept, a.offloaded, a.recomputed]
    return [strings(a.name), strings(shape), a.bytes, *rows, a.layer, strings(a.source), strings(a.reason)]


class _Facts:
    """What is known of a value of either graph by its node: name, op, shape, layer, source, homes, why it is there."""

    def __init__(self, p: Prepared, residency: Mapping[str, Residency], strings: _Strings) -> None:
        self.strings, self.residency = strings, residency
        self.in_forward = {n.name for n in p.forward.graph.nodes if n.op == "call_function"}
        self.layers = {n.name: n.meta[LAYER].index for n in p.joint.graph.nodes if LAYER in n.meta}
        self.sources = {n.name: source_line(n) for n in p.joint.graph.nodes}

    def row(self, node: fx.Node | None, name: str, category: Category, size: int, start: int, end: int) -> list[Any]:
        """[key, name, category, bytes, start, end, op, shape, layer, source, why]; texts by index."""
        text = self.strings
        key = str(node.meta.get(FOR) or node.meta.get(PART_OF) or node.name) if node is not None else name
        value = node.meta.get("val") if node is not None else None
        shape = ""
        if isinstance(value, torch.Tensor):
            shape = f"{str(value.dtype).removeprefix('torch.')}[{','.join(str(int(s)) for s in value.shape)}]"
        source = (source_line(node) if node is not None else "") or self.sources.get(key, "")
        why = str(node.meta.get(WHY, "")) if node is not None else ""
        if node is not None and FOR in node.meta and name != key:
            name = f"{key} (prefetch buffer)" if node.meta.get(ROLE) is Role.PREFETCH_BUFFER else f"{key} ({name})"
        op = op_name(node) if node is not None and node.op == "call_function" else ""
        numbers = [int(category), size, start, end]
        facts = [text(op), text(shape), self.layers.get(key), text(source), text(why)]
        return [text(key), text(name), *numbers, *facts]

    def in_the_forward(self, node: fx.Node | None, *, crosses: bool, for_user: bool) -> Category:
        """The category of a value that the forward makes."""
        if for_user:
            return Category.OUTPUT
        home = self.residency.get(node.name) if node is not None else None
        if home is not None and home.offloaded:
            return Category.OFFLOADED
        return Category.KEPT if crosses else Category.FORWARD_TRANSIENT

    def in_the_backward(self, node: fx.Node | None, *, returned: bool) -> Category:
        """The category of a value that the backward makes."""
        if returned:
            return Category.GRADIENT
        if node is None:
            return Category.BACKWARD_TRANSIENT
        role = node.meta.get(ROLE)
        if role in (Role.PREFETCH_BUFFER, Role.PREFETCHED):
            return Category.PREFETCHED
        made_again = node.name in self.in_forward or role is Role.RECOMPUTED
        return Category.RECOMPUTED if made_again else Category.BACKWARD_TRANSIENT


def _graph_timeline(
    forward: fx.GraphModule, backward: fx.GraphModule, saved: Sequence[str], p: Prepared, facts: _Facts
) -> dict[str, Any]:
    front, back = list(forward.graph.nodes), list(backward.graph.nodes)
    split, steps = len(front), len(front) + len(back)
    results = {storage_of(n) for n in front[-1].args[0][: p.num_forward_outputs] if isinstance(n, fx.Node)}
    by_name = {n.name: n for n in front}
    inputs = [n.name for n in backward.graph.find_nodes(op="placeholder")]
    later = lifetimes(backward, fused=p.fused, owned_inputs=frozenset(inputs[: len(saved)])).ranges
    ends: dict[fx.Node, int] = {}  # of saved storages: several views of one may be saved
    for name, received in zip(saved, inputs, strict=False):
        storage = storage_of(by_name[name])
        if received in later:
            ends[storage] = max(ends.get(storage, 0), split + later[received].end)
    rows = []
    for name, r in lifetimes(forward, fused=p.fused).ranges.items():
        node = by_name[name]
        end = steps if node in results else ends.get(node, r.end)
        category = facts.in_the_forward(node, crosses=node in ends, for_user=node in results)
        rows.append(facts.row(node, name, category, r.bytes, r.start, end))
    (output,) = backward.graph.find_nodes(op="output")
    returned = {storage_of(n) for n in output.args[0] if isinstance(n, fx.Node)}
    nodes = {n.name: n for n in back}
    for name, r in later.items():
        if name not in inputs:
            category = facts.in_the_backward(nodes[name], returned=nodes[name] in returned)
            rows.append(facts.row(nodes[name], name, category, r.bytes, split + r.start, split + r.end))
    labels = [facts.strings(n.name) for n in (*front, *back)]
    return {"steps": steps, "forward": split, "labels": labels, "tensors": rows, "held": None, "emitted": False}


def _emitted_timeline(decided: Decided, emitted: Mapping[str, Any], plan: Plan, facts: _Facts) -> dict[str, Any]:
    forward: Body = emitted["forward"]
    backward: Body = emitted["backward"]
    split, steps = forward.steps, forward.steps + backward.steps
    placed = {(b.side, b.name): b for b in plan.buffers}
    for_user = {s for s in forward.outputs[: emitted["user_outputs"]] if s is not None}
    returned = {s for s in backward.outputs if s is not None}
    rows = []
    for side, body, graph in ((Side.FORWARD, forward, decided.forward), (Side.BACKWARD, backward, decided.backward)):
        nodes = {n.name: n for n in graph.graph.nodes}
        shift = 0 if side is Side.FORWARD else split
        for s in body.storages.values():
            if s.kind == Kind.INPUT or not s.bytes:
                continue
            node = nodes.get(body.origins.get(s.name, ""))
            at = placed.get((side, s.name))
            start, end = (at.start, at.end) if at is not None else (shift + s.start, shift + s.end)
            if side is Side.FORWARD:
                user = s.name in for_user
                end = steps if user else end
                category = facts.in_the_forward(node, crosses=end > split, for_user=user)
            else:
                end = steps if s.name in returned else end
                category = facts.in_the_backward(node, returned=s.name in returned)
            if s.kind in (Kind.KERNEL, Kind.WORKSPACE) and category.transient:
                category = Category.KERNEL
            row = facts.row(node, node.name if node is not None else s.name, category, s.bytes, start, end)
            rows.append([*row, *((at.segment, at.offset) if at is not None else ("", 0))])
    labels = [facts.strings(text) for text in (*forward.labels, *backward.labels)]
    held = _held(plan, steps)
    return {"steps": steps, "forward": split, "labels": labels, "tensors": rows, "held": held, "emitted": True}


def _held(plan: Plan, steps: int) -> list[int]:
    """Bytes of the arena's segments at each step, whatever lies in them."""
    return live_bytes([(s.start, s.end, s.size) for s in plan.segments], steps)


def _segments(plan: Plan) -> list[list[Any]]:
    """[name, base, bytes, start, end]. Bases are for the picture: segments lie as if they were buffers of one block."""
    buffers = [Buffer(s.name, s.size, s.start, s.end) for s in plan.segments]
    offsets = place(buffers, time_limit=1.0).offsets if buffers else {}
    return [[s.name, offsets[s.name], s.size, s.start, s.end] for s in plan.segments]


def simulated(p: Prepared, decided: Decided) -> Simulation | None:
    """The step as the simulator plays it, its steps named by their nodes; None where nothing was decided."""
    if decided.problem is None or not decided.residency:
        return None
    played = simulate(decided.problem, decided.residency)
    names = [n.name for n in (*p.forward.graph.nodes, *p.backward.graph.nodes)]
    steps = {f"step {i}": name for i, name in enumerate(names)}
    events = (replace(e, name=steps.get(e.name, e.name)) for e in played.events if e.end > e.start)
    return replace(played, events=tuple(events))


def _streams(played: Simulation | None) -> dict[str, Any] | None:
    if played is None:
        return None
    events = [[e.stream, e.name, e.start, e.end, e.bytes] for e in played.events]
    return {"seconds": played.seconds, "stalls": dict(played.stalls), "overlap": played.overlap, "events": events}
