"""One layer as a Graphviz picture: what it computes, how long each value lives, and where its slices go."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import torch
import torch.fx as fx

from memo_compile.logs import logger
from memo_compile.passes.analysis.liveness import LiveRange, lifetimes, reaches_memory
from memo_compile.passes.fx.facts import is_view, nbytes, schema_name, source_line, storage_of
from memo_compile.passes.fx.meta import FOR, PART_OF
from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning.decide import Decided
from memo_compile.planning.prepared import Prepared

SVG_SECONDS = 30.0  # that `dot` may take

_INDEX = re.compile(r"^(?P<stack>.*?)(?:\.|\[)(?P<index>\d+)\]?(?:\.|\[|$)")

# Colours of the classes and homes, dark text on each.
COLOURS = {
    "saved": "#ffd8a8",
    "transient": "#e9ecef",
    "fused": "#ffffff",
    "transfer": "#d0bfff",
    "gradient": "#ffc9c9",
    "kept": "#8ce99a",
    "offloaded": "#a5d8ff",
    "recomputed": "#ffec99",
}

log = logger(__name__)

Layer = tuple[str, int]


def layer_of(node: fx.Node) -> Layer | None:
    """The list of modules and the index in it under which a node was traced; None outside of any list."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for entry in stack.values():
        path = re.sub(r"\._modules\['?([^'\]]+)'?\]", r".\1", str(entry[0]))
        match = _INDEX.match(path)
        if match is not None:
            return match["stack"], int(match["index"])
    return None


def layers_by_value(p: Prepared) -> dict[str, Layer]:
    """The layer of each node of the joint graph that has one."""
    found = ((n.name, layer_of(n)) for n in p.joint.graph.nodes)
    return {name: layer for name, layer in found if layer is not None}


def typical_layer(layers: Iterable[Layer]) -> Layer | None:
    """The middle one of the list of modules that most nodes are in."""
    counts = Counter(stack for stack, _ in layers)
    if not counts:
        return None
    stack = min(counts, key=lambda s: (-counts[s], s))
    indices = sorted({i for s, i in layers if s == stack})
    return stack, indices[len(indices) // 2]


def layer_dot(p: Prepared, decided: Decided, layer: Layer | None = None) -> str | None:
    """One layer's forward and backward in the DOT language; None for a model without layers."""
    layers = layers_by_value(p)
    layer = layer or typical_layer(list(layers.values()))
    if layer is None:
        return None
    saved = frozenset(n.name for n in p.saved) | frozenset(decided.saved)
    fused = p.fused
    ranges = {
        "forward": lifetimes(decided.forward, fused=fused).ranges,
        "backward": lifetimes(decided.backward, fused=fused, owned_inputs=frozenset(decided.saved)).ranges,
    }
    lines = [
        "digraph layer {",
        f'  label="{escape(layer[0])}[{layer[1]}] of {escape(decided.plan.name)}";',
        "  labelloc=t; rankdir=TB; fontname=Helvetica;",
        '  node [shape=plain, fontname=Helvetica, fontsize=10]; edge [color="#868e96", arrowsize=0.6];',
        _legend(),
    ]
    shown: dict[str, set[fx.Node]] = {}
    for side, gm in (("forward", decided.forward), ("backward", decided.backward)):
        inside = {
            n for n in gm.graph.nodes if n.op == "call_function" and not is_view(n) and _layer(n, layers) == layer
        }
        shown[side] = inside
        lines.append(f'  subgraph cluster_{side} {{ label="{side}"; color="#ced4da";')
        for n in gm.graph.nodes:
            if n in inside:
                home = decided.residency.get(n.name) if side == "forward" else None
                lines.append(f"    {_id(side, n)} [label=<{_label(n, ranges[side].get(n.name), home, saved, fused)}>];")
        lines.append("  }")
    lines += _edges(shown, saved)
    return "\n".join([*lines, "}"]) + "\n"


def _layer(node: fx.Node, layers: Mapping[str, Layer]) -> Layer | None:
    return layers.get(str(node.meta.get(FOR, node.name))) or layer_of(node)


def _id(side: str, node: fx.Node) -> str:
    return f'"{side}/{node.name}"'


def _legend() -> str:
    cells = "".join(f'<td bgcolor="{colour}">{name}</td>' for name, colour in COLOURS.items())
    return f'  legend [label=<<table border="0" cellborder="1" cellspacing="0"><tr>{cells}</tr></table>>];'


def _label(node: fx.Node, live: LiveRange | None, home: Residency | None, saved: frozenset[str], fused: bool) -> str:
    target = node.target
    name = schema_name(node)
    kind = "saved" if node.name in saved else "transient"
    if name.startswith("memo::"):
        kind = "transfer"
    elif fused and not reaches_memory(node):
        kind = "fused"
    value = node.meta.get("val")
    shape = "×".join(str(int(s)) for s in value.shape) if isinstance(value, torch.Tensor) else ""
    facts = [
        escape(name.replace("::", ".") or getattr(target, "__name__", str(target))),
        f"{shape} {nbytes(node):,} B" if shape else "",
    ]
    if live is not None:
        facts.append(f"live [{live.start}, {live.end})")
    where = source_line(node).rpartition("/")[2]
    facts.append(escape(where[:48]))
    rows = f'<tr><td colspan="3" bgcolor="{COLOURS[kind]}"><b>{escape(node.name)}</b></td></tr>'
    rows += "".join(f'<tr><td colspan="3">{fact}</td></tr>' for fact in facts if fact)
    if home is not None:
        counts = {"offloaded": home.offloaded, "recomputed": home.recomputed, "kept": home.kept}
        bar = "".join(
            f'<td bgcolor="{COLOURS[k]}" width="{max(12, 120 * v // home.tokens)}">{v}</td>'
            for k, v in counts.items()
            if v
        )
        rows += f'<tr><td colspan="3"><table border="0" cellspacing="0" cellborder="1"><tr>{bar}</tr></table></td></tr>'
    return f'<table border="0" cellborder="0" cellspacing="0" cellpadding="1" bgcolor="#ffffff">{rows}</table>'


def _edges(shown: Mapping[str, set[fx.Node]], saved: frozenset[str]) -> list[str]:
    """Reads within a graph, and dashed from what the forward saves to who reads it in the backward."""
    lines: dict[str, None] = {}
    made = {n.name: n for n in shown["forward"]}
    for side, nodes in shown.items():
        for node in nodes:
            for source in _sources(node, nodes):
                if source in nodes:
                    lines[f"  {_id(side, source)} -> {_id(side, node)};"] = None
                elif side == "backward":
                    name = str(source.meta.get(PART_OF, source.name))
                    if name in made and name in saved:
                        lines[
                            f"  {_id('forward', made[name])} -> {_id(side, node)} [style=dashed, constraint=false];"
                        ] = None
    return sorted(lines)


def _sources(node: fx.Node, nodes: set[fx.Node]) -> set[fx.Node]:
    """What a node reads, views and nodes of no layer (sums of gradients) followed up to nodes that are shown."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [storage_of(a) for a in node.all_input_nodes]
    while stack:
        source = stack.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in nodes or source.op == "placeholder":
            found.add(source)
        elif layer_of(source) is None:
            stack += [storage_of(a) for a in source.all_input_nodes]
    return found


def render(dot: Path) -> Path | None:
    """An SVG beside a DOT file, where Graphviz is installed."""
    program = shutil.which("dot")
    if program is None:
        return None
    svg = dot.with_suffix(".svg")
    try:
        subprocess.run(
            [program, "-Tsvg", str(dot), "-o", str(svg)], check=True, capture_output=True, timeout=SVG_SECONDS
        )
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("dot made no picture of %s: %s", dot, error)
        return None
    return svg
