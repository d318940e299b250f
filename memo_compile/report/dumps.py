"""Writes what a compilation saw and decided into a folder: graphs, annotations, emitted code, plan and arena.

The same goes into torch's structured trace, where `TORCH_TRACE` asks for one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.fx as fx

from memo_compile.passes.graph import nbytes, source_line
from memo_compile.passes.lifetimes import lifetimes
from memo_compile.passes.tokens import META
from memo_compile.planner import Decided, Prepared
from memo_compile.report.tables import layer_table
from memo_compile.report.traces import artifact, tracing
from memo_compile.schema import Plan


@dataclass(frozen=True)
class Dump:
    """A folder for one graph, or None for no dump: without a trace either, every method does nothing."""

    folder: Path | None

    @property
    def wanted(self) -> bool:
        """Whether anything reads what is written."""
        return self.folder is not None or tracing()

    @staticmethod
    def open(root: str | None, name: str) -> Dump:
        """A dump under `root/name`."""
        if root is None:
            return Dump(None)
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        return Dump(folder)

    def _write(self, name: str, text: str) -> None:
        if self.folder is not None:
            (self.folder / name).write_text(text, encoding="utf-8")
        artifact(name, text)

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """`NAME.py`: a graph as Python that can be read and diffed."""
        if self.wanted:
            self._write(f"{name}.py", readable(gm))

    def annotated(self, p: Prepared, decided: Decided) -> None:
        """`annotated.py`: the joint graph, one comment a value: token axis, class, live range, bytes, homes."""
        if self.wanted:
            self._write("annotated.py", annotated(p, decided))

    def code(self, name: str, compiled: Any) -> None:
        """`NAME_code.py`: what Inductor emitted."""
        source = getattr(compiled, "source_code", None)
        if self.wanted and source:
            self._write(f"{name}_code.py", source)

    def plan(self, plan: Plan) -> None:
        """`plan.json`, `arena.json` and `layers.txt`."""
        if not self.wanted:
            return
        self._write("layers.txt", layer_table(plan))
        self._write("plan.json", plan.to_json())
        arena = {"segments": [asdict(s) for s in plan.segments], "buffers": [asdict(b) for b in plan.buffers]}
        self._write("arena.json", json.dumps(arena, indent=1))


_HEADER = """import torch
from torch import device, inf, nan
from torch.fx.experimental.proxy_tensor import *  # noqa: F403


"""


def readable(gm: fx.GraphModule) -> str:
    """A graph as a Python function."""
    code = gm.graph.python_code("self").src
    return _HEADER + code.lstrip("\n")


def annotated(p: Prepared, decided: Decided) -> str:
    """The joint graph, one line a node, with what the passes found."""
    saved = {n.name for n in p.saved}
    front = lifetimes(p.forward, fused=p.fused).ranges
    back = lifetimes(p.backward, fused=p.fused, owned_inputs=frozenset(saved)).ranges
    in_forward = {n.name for n in p.forward.graph.nodes}
    lines = [f"# token axis: {p.tokens.axis}"]
    for node in p.joint.graph.nodes:
        facts = [f"{nbytes(node):,} bytes"] if nbytes(node) else []
        info = node.meta.get(META)
        if info is not None:
            how = "token-mixing" if info.mixing else "token-wise" if info.sliceable else info.reason
            facts.append(f"tokens {info.axis.tokens} in dim {info.axis.dim}, {how}")
        facts.append(_class_of(node, saved, in_forward))
        if node.name in front:
            facts.append(f"forward [{front[node.name].start}, {front[node.name].end})")
        if node.name in back:
            facts.append(f"backward [{back[node.name].start}, {back[node.name].end})")
        home = decided.homes.get(node.name)
        if home is not None:
            facts.append(f"kept {home.kept}, offloaded {home.offloaded}, recomputed {home.recomputed}")
        where = source_line(node)
        lines.append(f"{node.format_node()}\n    # {'; '.join(facts)}{'; ' + where if where else ''}")
    return "\n".join(lines) + "\n"


def _class_of(node: fx.Node, saved: set[str], in_forward: set[str]) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    if node.name in saved:
        return "saved activation"
    return "forward transient" if node.name in in_forward else "backward transient"
