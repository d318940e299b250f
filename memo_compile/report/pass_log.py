"""What each pass did to the graphs: before and after as Python, a diff in words, and what it found.

Passes are watched as they run: those that annotate once, those that act each time that graphs are built for homes. What
is told is the building of the graphs that were decided on.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes import pipeline
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.facts import nbytes, op_name, source_line
from memo_compile.passes.fx.meta import TOKENS, WHY
from memo_compile.passes.pipeline import Graphs
from memo_compile.planning.decide import Decided
from memo_compile.planning.prepared import Prepared
from memo_compile.report.plain import plain

FOUND = "found.json"


@dataclass(frozen=True)
class Line:
    """One node of a graph, in words."""

    name: str
    text: str
    bytes: int
    source: str
    why: str
    is_input: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A graph at one moment: its Python, and a line a node."""

    python: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class PassRecord:
    """One pass. Graphs by name ("joint", or "forward" and "backward"); `found` as plain data, `summary` in words."""

    name: str
    before: Mapping[str, Snapshot]
    after: Mapping[str, Snapshot]
    summary: str
    found: Any = None


_HEADER = """import torch
from torch import device, inf, nan
from torch.fx.experimental.proxy_tensor import *  # noqa: F403


"""


def readable(gm: fx.GraphModule) -> str:
    """A graph as a Python function."""
    code = gm.graph.python_code("self").src
    return _HEADER + code.lstrip("\n")


def snapshot(gm: fx.GraphModule) -> Snapshot:
    """What a graph looks like now."""
    lines = tuple(
        Line(n.name, statement(n), nbytes(n), source_line(n), str(n.meta.get(WHY, "")), n.op == "placeholder")
        for n in gm.graph.nodes
        if n.op != "output"
    )
    return Snapshot(readable(gm), lines)


def statement(node: fx.Node) -> str:
    """`name = op(arguments)`."""
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.op != "call_function":
        return f"{node.name} = {node.op} {node.target}"
    arguments = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
    name = getattr(node.target, "__name__", "") if node.target is not None else ""
    op = op_name(node) if isinstance(node.target, torch._ops.OpOverload) else name or str(node.target)
    return f"{node.name} = {op}({', '.join(arguments)})"


@dataclass
class Watched:
    """Notes graphs after each pass, beginning with the joint graph as it came in."""

    last: Mapping[str, Snapshot]
    records: list[PassRecord] = field(default_factory=list)
    graphs: list[Graphs] = field(default_factory=list)

    def __call__(self, name: str, graphs: Graphs, found: Any) -> None:
        """See `passes.pipeline.Watch`."""
        after = {graph: snapshot(gm) for graph, gm in graphs.items()}
        summary = "\n".join(
            diff(graph, self.last[graph], after[graph], _MOVES.get((name, graph), ""))
            for graph in after
            if graph in self.last
        )
        if name in _NOTES:
            summary = f"{_NOTES[name]}\n\n{summary}"
        self.records.append(PassRecord(name, self.last, after, summary, plain(found)))
        self.last = after
        self.graphs.append(graphs)


@dataclass
class Watching:
    """Notes passes that annotate, and those that act for each time that graphs were built."""

    annotating: Watched
    acting: list[Watched] = field(default_factory=list)

    def __call__(self, name: str, graphs: Graphs, found: Any) -> None:
        """See `passes.pipeline.Watch`."""
        if name == pipeline.ACTING[0][0]:
            self.acting.append(Watched(self.annotating.last))
        (self.acting[-1] if self.acting else self.annotating)(name, graphs, found)

    def built(self, decided: Decided) -> Watched:
        """How the graphs of a decision were built; of one to change nothing, torch's own split."""
        for run in self.acting:
            if run.graphs[-1]["forward"] is decided.forward:
                return run
        split = Watched(self.annotating.last)
        split("partition", {"forward": decided.forward, "backward": decided.backward}, None)
        return split


def pass_log(watched: Watching, p: Prepared, decided: Decided) -> list[PassRecord]:
    """The passes in order, those that act as for the decision; words of their own for those that make more of it."""
    in_words: dict[str, Callable[[PassRecord], str]] = {
        "tokens": lambda _: _tokens(p),
        "partition": lambda record: _partition(p, decided, record.after),
    }
    return [
        replace(r, summary=in_words[r.name](r)) if r.name in in_words else r
        for r in (*watched.annotating.records, *watched.built(decided).records)
    ]


_NOTES = {"unplanned": "dead nodes and duplicates are dropped, as torch's own partitioner does"}
# Why nodes of a graph move in a pass.
_MOVES = {
    ("slices", "backward"): "recomputed directly before the first gradient that needs it",
    ("offloads", "forward"): "waits where the link will have ended the copy",
}


def _tokens(p: Prepared) -> str:
    infos: list[tuple[fx.Node, TokenInfo]] = [(n, n.meta[TOKENS]) for n in p.joint.graph.nodes if TOKENS in n.meta]
    mixing = sum(1 for _, info in infos if info.mixing)
    lines = [
        "nothing is added or moved; each value's token axis is noted",
        f"axis: {p.tokens.axis}",
        f"{len(infos)} of {len(p.joint.graph.nodes)} nodes have it: "
        f"{sum(1 for _, info in infos if info.sliceable)} can be computed in slices, {mixing} mix tokens",
        f"it ends at {len(p.tokens.stops)} nodes",
    ]
    lines += [f"  | {s.node} ({s.op}): {s.reason}{_at(s.source)}" for s in p.tokens.stops]
    return "\n".join(lines) + "\n"


def _partition(p: Prepared, decided: Decided, split: Mapping[str, Snapshot]) -> str:
    front, back = ({line.name for line in split[g].lines} for g in ("forward", "backward"))
    nodes = [n for n in p.joint.graph.nodes if n.op == "call_function"]
    held = {line.name for line in split["backward"].lines if line.is_input}
    twice = [n for n in nodes if n.name in front and n.name in back and n.name not in held]
    lines = [
        f"joint, {len(p.joint.graph.nodes)} nodes -> forward, {len(front)}, and backward, {len(back)}",
        f"saved for the backward: {len(held & front)} values",
        f"run in both: {len(twice)} nodes",
    ]
    for n in twice:
        home = decided.residency.get(n.name)
        whole = home is not None and home.recomputed == home.tokens
        why = "the plan recomputes it whole" if whole else "recomputed from what is saved"
        lines.append(f"  = {statement(n)}{_note(nbytes(n), source_line(n), why)}")
    return "\n".join(lines) + "\n"


def diff(graph: str, before: Snapshot, after: Snapshot, move: str) -> str:
    """What changed, in words: nodes added, removed, with other arguments, moved; and why.

    Args:
        move: why nodes of this graph move in this pass.
    """
    old = {line.name: line for line in before.lines}
    new = {line.name: line for line in after.lines}
    added = [line for line in after.lines if line.name not in old]
    removed = [line for line in before.lines if line.name not in new]
    common = [line for line in after.lines if line.name in old]
    changed = [line for line in common if line.text != old[line.name].text]
    moved = _moved([line.name for line in before.lines if line.name in new], [line.name for line in common])
    counts = f"{len(added)} added, {len(removed)} removed, {len(moved)} moved, {len(changed)} with other arguments"
    lines = [f"{graph}: {len(before.lines)} -> {len(after.lines)} nodes: {counts}"]
    lines += [f"  + {line.text}{_note(line.bytes, line.source, line.why)}" for line in added]
    lines += [f"  - {line.text}{_note(line.bytes, line.source, '')}" for line in removed]
    previous = _predecessors(before), _predecessors(after)
    lines += [
        f"  > {name}: from after {previous[0][name]} to after {previous[1][name]}{f'; {move}' if move else ''}"
        for name in moved
    ]
    for line in changed:
        lines += [f"  ~ {old[line.name].text}", f"    {line.text}"]
    return "\n".join(lines) + "\n"


def _predecessors(shot: Snapshot) -> dict[str, str]:
    names = ["the start", *(line.name for line in shot.lines)]
    return dict(zip(names[1:], names, strict=False))


def _moved(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The fewest names that must move to turn one order into the other, in the new order.

    >>> _moved(["a", "b", "c", "d"], ["b", "c", "a", "d"])
    ['a']
    """
    place = {name: i for i, name in enumerate(before)}
    sequence = [place[name] for name in after]
    # The longest increasing subsequence stays; patience sorting, with links back.
    tops: list[int] = []
    at: list[int] = []
    link: list[int] = []
    for i, value in enumerate(sequence):
        pile = bisect_left(tops, value)
        tops[pile : pile + 1] = [value]
        at[pile : pile + 1] = [i]
        link.append(at[pile - 1] if pile else -1)
    stays: set[int] = set()
    i = at[-1] if at else -1
    while i >= 0:
        stays.add(i)
        i = link[i]
    return [name for i, name in enumerate(after) if i not in stays]


def _note(size: int, source: str, why: str) -> str:
    facts = [f"{size:,} bytes" if size else "", why, source]
    found = "; ".join(f for f in facts if f)
    return f"\n      # {found}" if found else ""


def _at(source: str) -> str:
    return f", {source}" if source else ""


def folder_of(number: int, name: str) -> str:
    """Where the dump holds a pass, counted from one."""
    return f"passes/{number}-{name}"


def as_files(records: Sequence[PassRecord]) -> dict[str, str]:
    """Relative paths and texts: a folder a pass, its graphs before and after, `diff.txt`, and what it found."""
    files: dict[str, Any] = {}
    for number, record in enumerate(records, start=1):
        folder = folder_of(number, record.name)
        for when, graphs in (("before", record.before), ("after", record.after)):
            files.update({f"{folder}/{graph}.{when}.py": shot.python for graph, shot in graphs.items()})
        files[f"{folder}/diff.txt"] = f"{record.name}\n\n{record.summary}"
        if record.found is not None:
            files[f"{folder}/{FOUND}"] = json.dumps(record.found)
    return files
