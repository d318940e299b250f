"""An explanation: what was found, and the same as tables for a terminal, as text, and as HTML for a notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memo_compile.report.units import human, short
from memo_compile.schema import Plan

TEXT_WIDTH = 160
LARGEST = 8  # rows of the tables of tensors and of workspaces
SQUARES = "; S×S: these grow with the square of the tokens"


class Alarm(str):
    """A cell that is to stand out."""


Table = tuple[str, Sequence[str], list[Sequence[str]]]  # title, columns, rows


@dataclass(frozen=True)
class Break:
    """Why Dynamo ended a graph, and the user's line at which it did."""

    reason: str
    source: str


@dataclass(frozen=True)
class TensorRow:
    """Tensors of one source line, shape and dtype: `count` of them, `bytes` each.

    `quadratic` says that a size of the data stands twice in the shape, as in an S × S mask.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    count: int
    source: str
    quadratic: bool


@dataclass(frozen=True)
class SavedRow:
    """Saved activations of one source line, shape and dtype, with rows of each home; and who reads them."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    count: int
    kept: float
    offloaded: float
    recomputed: float
    source: str
    readers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class LayerRow:
    """Layers of one class, named by their modules: saved bytes of all of them, and the share of bytes in each home."""

    modules: str
    count: int
    bytes: int
    kept: float
    offloaded: float
    recomputed: float


@dataclass(frozen=True)
class Unsliced:
    """Saved bytes that cannot be sliced, or only kept and offloaded in slices, for one reason at one line."""

    name: str
    bytes: int
    count: int
    source: str
    reason: str


@dataclass(frozen=True)
class GraphExplained:
    """One graph. `plan` is None where it needs no gradient; `refused` says so where the budget cannot be kept.

    With `refused` the plan is the smallest there is. `inputs_bytes` counts the inputs and parameters that the backward
    reads: they are the caller's, and cost nothing to save.
    """

    name: str
    nodes: int
    plan: Plan | None
    refused: str
    largest: tuple[TensorRow, ...]
    saved: tuple[SavedRow, ...]
    inputs_read: int
    inputs_bytes: int
    layers: tuple[LayerRow, ...]
    unsliced: tuple[Unsliced, ...]


@dataclass(frozen=True)
class Explanation:
    """What `memo_compile.explain` found. Prints as tables, in a terminal and in a notebook."""

    graphs: tuple[GraphExplained, ...]
    breaks: tuple[Break, ...]

    def __rich__(self) -> Any:
        return render(self)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def tables(explanation: Explanation) -> list[Table]:
    """All tables, in the order in which they are read."""
    count = len(explanation.graphs)
    breaks = [(Alarm(b.reason), short(b.source)) for b in explanation.breaks]
    found: list[Table] = [(f"{count} graph{'s' * (count != 1)}, {len(breaks)} breaks", ("why", "where"), [*breaks])]
    for graph in explanation.graphs:
        found += _graph_tables(graph)
    return found


def _graph_tables(graph: GraphExplained) -> Iterable[Table]:
    plan = graph.plan
    if plan is None:
        return [(f"{graph.name}: {graph.nodes} nodes, needs no gradient: nothing is saved", (), [])]
    budget = "unlimited" if plan.budget is None else human(plan.budget)
    ratio = f"{plan.arena_bytes / plan.lower_bound:.4f}" if plan.lower_bound else "1"
    facts: list[Sequence[str]] = [
        ("budget", Alarm(f"{budget}: {graph.refused}") if graph.refused else budget),
        ("peak", f"{human(plan.predicted_peak)} ({human(plan.unplanned_peak)} unplanned)"),
        ("arena", f"{human(plan.arena_bytes)}, lower bound {human(plan.lower_bound)}, ratio {ratio}"),
        ("saved", f"{human(sum(a.bytes for a in plan.activations))} in {len(plan.activations)} activations"),
        ("homes", _by_home(plan.kept_bytes, plan.offloaded_bytes, plan.recomputed_bytes)),
        ("recomputed FLOPs", f"{plan.recomputed_flops_share:.1%} of the forward"),
        ("inputs read back", f"{graph.inputs_read} inputs and parameters, {human(graph.inputs_bytes)}, at no cost"),
        ("binding", plan.binding),
        ("token axis", plan.token_axis),
    ]
    return [
        (f"{graph.name} ({plan.name}): {graph.nodes} nodes", ("", ""), facts),
        (
            f"largest tensors{SQUARES if any(r.quadratic for r in graph.largest) else ''}",
            ("tensor", "op", "shape", "each", "count", "source"),
            [
                (
                    r.name,
                    r.op.removeprefix("aten."),
                    Alarm(f"{_shape(r.shape, r.dtype)} S×S") if r.quadratic else _shape(r.shape, r.dtype),
                    Alarm(human(r.bytes)) if r.quadratic else human(r.bytes),
                    str(r.count),
                    short(r.source),
                )
                for r in graph.largest
            ],
        ),
        (
            "residency by layers",
            ("modules", "layers", "saved", "kept", "offloaded", "recomputed"),
            [
                (r.modules, str(r.count), human(r.bytes), *_percent(r.kept, r.offloaded, r.recomputed))
                for r in graph.layers
            ],
        ),
        (
            "saved, and why",
            ("value", "shape", "each", "count", "kept", "offloaded", "recomputed", "read by", "source", "note"),
            [
                (
                    r.name,
                    _shape(r.shape, r.dtype),
                    human(r.bytes),
                    str(r.count),
                    *_percent(r.kept, r.offloaded, r.recomputed),
                    ", ".join(r.readers[:3]) + (" …" if len(r.readers) > 3 else ""),
                    short(r.source),
                    r.reason,
                )
                for r in graph.saved
            ],
        ),
        (
            "not sliced",
            ("value", "bytes", "count", "why", "source"),
            [(u.name, human(u.bytes), str(u.count), u.reason, short(u.source)) for u in graph.unsliced],
        ),
        (
            "what kernels take for themselves",
            ("node", "op", "bytes", "known", "source"),
            [(w.node, w.op, human(w.bytes), w.how, short(w.source)) for w in plan.workspaces[:LARGEST]],
        ),
        (
            "where the token axis ends",
            ("node", "op", "why", "source"),
            [(s.node, s.op, s.reason, short(s.source)) for s in plan.stops],
        ),
    ]


def _by_home(kept: int, offloaded: int, recomputed: int) -> str:
    return f"{human(kept)} kept, {human(offloaded)} offloaded, {human(recomputed)} recomputed"


def _percent(*shares: float) -> tuple[str, ...]:
    return tuple(f"{share:.0%}" if share else "" for share in shares)


def _shape(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def render(explanation: Explanation) -> Any:
    """What rich prints."""
    from rich import box  # loads rich
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[Any] = []
    for title, columns, rows in tables(explanation):
        if not rows:
            if columns and parts:
                continue
            parts.append(Text(title, style="bold"))
            continue
        table = RichTable(
            title=title, title_justify="left", title_style="bold", show_header=any(columns), box=box.SIMPLE_HEAD
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(c, style="bold red" if isinstance(c, Alarm) else "") for c in row))
        parts.append(table)
    return Group(*parts)


def as_text(explanation: Explanation) -> str:
    """The tables as plain text."""
    from rich.console import Console  # loads rich

    stream = io.StringIO()
    Console(file=stream, width=TEXT_WIDTH, color_system=None).print(render(explanation))
    return stream.getvalue()


def as_html(explanation: Explanation) -> str:
    """The tables as HTML, for a notebook."""
    out: list[str] = []
    for title, columns, rows in tables(explanation):
        if not rows and columns and out:
            continue
        out.append(f"<h4>{html.escape(title)}</h4>")
        if not rows:
            continue
        head = "".join(f"<th style='text-align:left'>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(_cell(c) for c in row) + "</tr>" for row in rows)
        out.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return "\n".join(out)


def _cell(text: str) -> str:
    if isinstance(text, Alarm):
        return f"<td style='text-align:left;color:#c92a2a;font-weight:bold'>{html.escape(text)}</td>"
    return f"<td style='text-align:left'>{html.escape(text)}</td>"
