"""Writes what a compilation saw and decided into a folder, from which it can be read, run again and reported on.

    joint.py, forward.py, backward.py   graphs as Python
    annotated.py                        the joint graph with what the passes found
    passes/N-NAME/                      each pass: its graphs before and after, diff.txt, found.json
    forward_code.py, backward_code.py   what Inductor emitted
    layer.dot, layer.svg                one layer with live ranges and homes
    layers.txt                          saved activations, those of one source line in one row
    plan.json, arena.json               what was decided, and where every buffer lies
    joint.json, compilation.json        for `memo replay`
    emitted.json                        what the emitted code allocates, and when
    report.json                         for `memo report`
    simulated.trace.json                the step as the simulator plays it, for Perfetto
    measured_{forward,backward}.trace.json  the second step, profiled; on CUDA

No tensor data is written. What a person reads goes into torch's structured trace too, where `TORCH_TRACE` asks for one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import distributed
from torch._functorch import config as functorch

from memo_compile import __version__
from memo_compile.errors import NotReplayable
from memo_compile.logs import logger
from memo_compile.options import Options
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.fx.facts import nbytes, source_line
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.pipeline import Graphs
from memo_compile.planning.decide import Decided
from memo_compile.planning.prepared import Prepared
from memo_compile.report.graph_io import graph_to_json
from memo_compile.report.measured import profiled
from memo_compile.report.pass_log import Watched, Watching, as_files, pass_log, readable, snapshot
from memo_compile.report.picture import layer_dot, render
from memo_compile.report.tables import layer_table
from memo_compile.report.timeline import report_data, simulated
from memo_compile.report.traces import artifact, tracing
from memo_compile.schema import Plan

DUMP_VERSION = 2

log = logger(__name__)


@dataclass(frozen=True)
class Dump:
    """A folder for one graph, or None for no dump: without a trace either, every method does nothing.

    `watched` are the passes over each joint graph that came in, of which the last counts: one with symbols may have
    come before.
    """

    folder: Path | None
    watched: list[Watching] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        """Whether anything reads what is written."""
        return self.folder is not None or tracing()

    @staticmethod
    def open(root: str | None, name: str) -> Dump:
        """A dump in `root/name`: of rank 3 in `root/rank_3_name`, and in `root/name_2` where another run's is there."""
        return Dump(None if root is None else _own_folder(root, f"{_rank()}{name}"))

    def _write(self, name: str, text: str) -> None:
        if self.folder is not None:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def _show(self, name: str, text: str) -> None:
        self._write(name, text)
        artifact(name.replace("/", "_"), text)

    def joint(self, gm: fx.GraphModule, num_forward_outputs: int, static_inputs: list[int] | None) -> None:
        """`joint.py` and `joint.json`: the joint graph as it came in, before a pass has touched it."""
        if not self.wanted:
            return
        self.watched.append(Watching(Watched({"joint": snapshot(gm)})))
        self._show("joint.py", readable(gm))
        try:
            graph = graph_to_json(gm)
        except NotReplayable as error:
            log.warning("%s: this dump cannot be replayed: %s", self.folder, error)
            return
        facts = {"num_forward_outputs": num_forward_outputs, "static_inputs": list(static_inputs or ())}
        self._write("joint.json", json.dumps({"version": DUMP_VERSION, **facts, "graph": graph}))

    def watch(self, name: str, graphs: Graphs, found: Any) -> None:
        """Note what a pass did to the graphs, and what it found."""
        if self.watched:
            self.watched[-1](name, graphs, found)

    def decided(self, p: Prepared, decided: Decided, options: Options) -> None:
        """What the passes found, decided and did."""
        if not self.wanted:
            return
        self._show("annotated.py", annotated(p, decided))
        self._show("forward.py", readable(decided.forward))
        self._show("backward.py", readable(decided.backward))
        for name, text in as_files(pass_log(self.watched[-1], p, decided)).items():
            self._show(name, text)
        picture = layer_dot(p, decided)
        if picture is not None:
            self._show("layer.dot", picture)
        if picture is not None and self.folder is not None:
            render(self.folder / "layer.dot")
        self._write("compilation.json", json.dumps(compilation_record(p, decided, options), indent=1, default=str))

    def code(self, name: str, compiled: Any) -> None:
        """`NAME_code.py`: what Inductor emitted."""
        source = getattr(compiled, "source_code", None)
        if self.wanted and source:
            self._show(f"{name}_code.py", source)

    def measured(self, name: str, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """`fn`, which on CUDA leaves `measured_NAME.trace.json` once it has run twice."""
        if self.folder is None or device.type != "cuda":
            return fn
        return profiled(fn, self.folder / f"measured_{name}.trace.json")

    def emitted(self, arguments: Mapping[str, Any]) -> None:
        """`emitted.json`: what the arena was laid out from, the arguments of `codegen.arena.layout.plan_arena`."""
        if self.folder is not None:
            self._write("emitted.json", json.dumps({k: _plain(v) for k, v in arguments.items()}))

    def report(self, p: Prepared, decided: Decided, plan: Plan, emitted: Mapping[str, Any] | None = None) -> None:
        """`report.json`, for `memo report`, and `simulated.trace.json`; `emitted` as in `timeline.report_data`."""
        if self.folder is not None:
            # Under the folder's name, which tells ranks and runs apart.
            data = report_data(p, decided, replace(plan, name=self.folder.name), emitted)
            self._write("report.json", json.dumps(data, separators=(",", ":")))
            played = simulated(p, decided)
            if played is not None:
                self._write("simulated.trace.json", played.to_trace())

    def plan(self, plan: Plan) -> None:
        """`plan.json`, `arena.json` and `layers.txt`."""
        if not self.wanted:
            return
        self._show("layers.txt", layer_table(plan))
        self._show("plan.json", plan.to_json())
        arena = {"segments": [asdict(s) for s in plan.segments], "buffers": [asdict(b) for b in plan.buffers]}
        self._show("arena.json", json.dumps(arena, indent=1))


@cache  # a graph that this process plans once more writes over what it has written
def _own_folder(root: str, name: str) -> Path:
    """A new folder: what an earlier run, or a process that runs now, has written there is left alone."""
    folder, number = Path(root) / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = Path(root) / f"{name}_{number}"


os.register_at_fork(after_in_child=_own_folder.cache_clear)  # what the parent has written is not the child's


def _rank() -> str:
    """What tells the ranks of a distributed run apart: they plan the same graphs and share a folder."""
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    return "" if alone else f"rank_{distributed.get_rank()}_"


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def torch_config() -> dict[str, dict[str, Any]]:
    """The settings of torch that its partitioner and dead code elimination read: numbers and flags."""
    from torch._inductor import config as inductor  # loads Inductor

    plain = {k: v for k, v in functorch.get_config_copy().items() if isinstance(v, (bool, int, float, str))}
    return {"functorch": plain, "inductor": {"fallback_random": inductor.fallback_random}}


def compilation_record(p: Prepared, decided: Decided, options: Options) -> dict[str, Any]:
    """What `memo replay` compares with, pass by pass."""
    return {
        "version": DUMP_VERSION,
        "memo": __version__,
        "torch": torch.__version__,
        "options": asdict(options),
        "profile": asdict(p.profile),
        "torch_config": torch_config(),
        "fused": p.fused,
        "limits": asdict(decided.limits),
        "overlap": decided.overlap,
        "unplanned_peak": p.unplanned_peak,
        "homes": {name: [h.tokens, h.kept, h.offloaded, h.recomputed] for name, h in decided.residency.items()},
        "decided": asdict(decided.plan),
    }


def annotated(p: Prepared, decided: Decided) -> str:
    """The joint graph, one line a node, with what the passes found."""
    saved = {n.name for n in p.saved}
    front = lifetimes(p.forward, fused=p.fused).ranges
    back = lifetimes(p.backward, fused=p.fused, owned_inputs=frozenset(saved)).ranges
    in_forward = {n.name for n in p.forward.graph.nodes}
    lines = [f"# token axis: {p.tokens.axis}"]
    for node in p.joint.graph.nodes:
        facts = [f"{nbytes(node):,} bytes"] if nbytes(node) else []
        info = node.meta.get(TOKENS)
        if info is not None:
            how = "token-mixing" if info.mixing else "token-wise" if info.sliceable else info.reason
            facts.append(f"tokens {info.axis.tokens} in dim {info.axis.dim}, {how}")
        facts.append(_class_of(node, saved, in_forward))
        if node.name in front:
            facts.append(f"forward [{front[node.name].start}, {front[node.name].end})")
        if node.name in back:
            facts.append(f"backward [{back[node.name].start}, {back[node.name].end})")
        home = decided.residency.get(node.name)
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
