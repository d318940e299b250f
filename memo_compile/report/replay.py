"""Runs the passes again from a dump: no model, no device, no data. Each pass is compared with what the dump says.

Private torch APIs, tried with torch 2.13: `torch._guards.tracing`, and the config modules' copies and patches.

Passes that act get the dump's decision, so that a difference shows at the pass that makes it and not in all after it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch
from torch._guards import TracingContext, tracing

from memo_compile import __version__
from memo_compile.codegen.arena.layout import Link, plan_arena
from memo_compile.codegen.arena.sides import key_of
from memo_compile.codegen.emitted.body import Body, Kind, Storage
from memo_compile.errors import NotReplayable
from memo_compile.hardware.device_memory import Allocator
from memo_compile.hardware.profiles import from_fields
from memo_compile.passes import pipeline
from memo_compile.passes.fx.build import fake_mode
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.pipeline import Graphs, Watch
from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning.decide import Decided, carry_out, decide
from memo_compile.planning.prepared import Prepared, prepare
from memo_compile.planning.problem import Limits
from memo_compile.planning.tiling import with_tiles
from memo_compile.report.dumps import DUMP_VERSION
from memo_compile.report.graph_io import graph_from_json
from memo_compile.report.pass_log import FOUND, folder_of, readable
from memo_compile.report.plain import plain
from memo_compile.runtime.ops import register
from memo_compile.schema import Plan, Side
from memo_compile.workspaces.annotate import Workspaces

MOST_SHOWN = 24  # differences of one pass
RELATIVE = 1e-9  # by which a sum of seconds may differ: another order of summation


@dataclass(frozen=True)
class Replayed:
    """One pass, run again. `differences` is empty where it did what the dump says."""

    name: str
    seconds: float
    note: str
    differences: tuple[str, ...]


def graph_folders(root: Path) -> list[Path]:
    """The folders of single graphs in a dump: `root` itself, or those in it.

    Raises:
        NotReplayable: there is none.
    """
    found = [f for f in (root, *sorted(root.glob("*/"))) if (f / "compilation.json").is_file()]
    if not found:
        raise NotReplayable(
            f"{root} holds no dump that can be replayed: neither it nor a folder in it has a compilation.json. "
            'Dumps are written with options={"dump": DIR}, or MEMO_DUMP=DIR, while a graph is planned.'
        )
    return found


def replay(folder: Path) -> Iterator[Replayed]:
    """Run the passes of one dumped graph again, one after another.

    Raises:
        NotReplayable: files are missing, or of another version, or the graph needs an op that this torch lacks.
    """

    register()
    record, raw = _read(folder / "compilation.json"), _read(folder / "joint.json")
    dumped = Plan.from_json(_text(folder / "plan.json"))
    timer = _Timer()
    joint = graph_from_json(raw["graph"])
    yield timer.done("read", f"{len(joint.graph.nodes)} nodes", _versions(record))
    with _as_when_compiled(joint, record["torch_config"]):
        yield from _passes(joint, record, raw, dumped, folder, timer)


@contextlib.contextmanager
def _as_when_compiled(joint: fx.GraphModule, settings: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """The surroundings in which torch's partitioner ran: its settings, and a tracing context, without which random
    ops are not taken for dead.
    """
    from torch._inductor import config as inductor  # loads Inductor

    known = functorch.get_config_copy()
    with (
        functorch.patch({k: v for k, v in settings["functorch"].items() if k in known}),
        inductor.patch(settings["inductor"]),
        tracing(TracingContext(fake_mode(joint.graph))),
    ):
        yield


def _passes(
    joint: fx.GraphModule, record: Mapping[str, Any], raw: Mapping[str, Any], dumped: Plan, folder: Path, timer: _Timer
) -> Iterator[Replayed]:
    placeholders = [n.meta["val"] for n in joint.graph.find_nodes(op="placeholder")]
    profile = from_fields(record["profile"])
    known = {w.node: w for w in dumped.workspaces}
    done: list[Replayed] = []
    p = prepare(
        *(joint, (placeholders, []), raw["num_forward_outputs"], raw["static_inputs"], profile),
        fused=record["fused"],
        workspaces=Workspaces(record["fused"], measure=False, given=known),
        watch=_watching(folder, timer, 0, done),
    )
    yield from done
    p = replace(p, unplanned_peak=record["unplanned_peak"])
    if record["limits"] is None:
        return
    limits = Limits(**record["limits"])
    p = with_tiles(p, limits)
    decided = decide(p, limits, name=dumped.name, backend=dumped.backend)
    yield timer.done("residency", f"{len(decided.residency)} activations", _decision(decided, record))
    if record["homes"]:
        yield from _acting(p, record, limits, folder, timer)
    if (folder / "emitted.json").is_file():
        yield _arena(_read(folder / "emitted.json"), dumped, timer)


class _Timer:
    def __init__(self) -> None:
        self.since = time.perf_counter()

    def done(self, name: str, note: str, differences: Sequence[str]) -> Replayed:
        """A pass has ended."""
        before, self.since = self.since, time.perf_counter()
        return Replayed(name, self.since - before, note, tuple(differences))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotReplayable(f"{path} cannot be read ({error.strerror}): the dump is not complete") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = json.loads(_text(path))
    except ValueError as error:
        raise NotReplayable(f"{path} is no JSON: {error}") from error
    if raw.get("version", DUMP_VERSION) != DUMP_VERSION:
        raise NotReplayable(f"{path} has dump version {raw['version']}; this memo reads {DUMP_VERSION}")
    return raw


def _versions(record: Mapping[str, Any]) -> list[str]:
    here = {"memo": __version__, "torch": torch.__version__}
    return [f"the dump was made with {k} {record[k]}, this is {v}" for k, v in here.items() if record[k] != v]


def _watching(folder: Path, timer: _Timer, after: int, done: list[Replayed]) -> Watch:
    """Compares each pass with the dump, whose folders are counted from the pass `after` that number."""

    def watch(name: str, graphs: Graphs, found: Any) -> None:
        dumped = folder / folder_of(after + len(done) + 1, name)
        differences = [d for g, gm in graphs.items() for d in _graph(gm, dumped / f"{g}.after.py")]
        if found is not None:
            differences += _fields("", json.loads(_text(dumped / FOUND)), plain(found))
        note = f"{' + '.join(str(len(gm.graph.nodes)) for gm in graphs.values())} nodes"
        done.append(timer.done(name, note, differences[:MOST_SHOWN]))

    return watch


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > RELATIVE * max(abs(a), abs(b))


def _fields(path: str, before: Any, now: Any) -> list[str]:
    """Where two pieces of plain data differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(k for k in now if k not in before)]
        return [d for k in keys for d in _fields(f"{path}.{k}" if path else str(k), before.get(k), now.get(k))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [d for i, (a, b) in enumerate(zip(before, now, strict=True)) for d in _fields(f"{path}[{i}]", a, b)]
    same = not _differ(before, now) if isinstance(before, float) and isinstance(now, float) else before == now
    return [] if same else [f"{path}: {_short(before)} in the dump, {_short(now)} here"]


def _short(value: Any) -> str:
    text = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _decision(decided: Decided, record: Mapping[str, Any]) -> list[str]:
    residency = {name: [h.tokens, h.kept, h.offloaded, h.recomputed] for name, h in decided.residency.items()}
    differences = [
        f"{name}: {_in_words(record['homes'].get(name))} in the dump, {_in_words(residency.get(name))} here"
        for name in dict.fromkeys([*record["homes"], *residency])
        if record["homes"].get(name) != residency.get(name)
    ]
    now = json.loads(json.dumps(asdict(decided.plan)))
    # Measured; compared above; and what is known once the plan fits.
    left_out = {"seconds", "activations", "least_peak", "rounds", "budget", "version"}
    before = {k: v for k, v in record["decided"].items() if k not in left_out}
    return differences + _fields("", before, {k: v for k, v in now.items() if k not in left_out})


def _in_words(home: Sequence[int] | None) -> str:
    if home is None:
        return "not to be moved"
    tokens, kept, offloaded, recomputed = home
    return f"kept {kept}, offloaded {offloaded}, recomputed {recomputed} of {tokens}"


def _acting(p: Prepared, record: Mapping[str, Any], limits: Limits, folder: Path, timer: _Timer) -> Iterator[Replayed]:
    axes = {n.name: n.meta[TOKENS].axis for n in p.saved if TOKENS in n.meta}
    residency = {
        name: Residency(*rows, axis=axes.get(name) if tokens > 1 else None)
        for name, (tokens, *rows) in record["homes"].items()
    }
    lost = [name for name, h in residency.items() if name not in p.chains or (h.tokens > 1 and h.axis is None)]
    if lost:
        yield timer.done(
            "partition", "not run", [f"{name} has a home in the dump and is no saved value here" for name in lost]
        )
        return
    done: list[Replayed] = []
    watch = _watching(folder, timer, len(pipeline.ANNOTATING), done)
    overlap = record["overlap"] if "overlap" in record else record["ahead"]  # as dumps of before have it
    carry_out(p, residency, overlap=overlap, host_budget=limits.host_in_all, watch=watch)
    yield from done


def _graph(gm: fx.GraphModule, path: Path) -> list[str]:
    """The first lines in which a graph differs from a dumped one."""
    before, now = _statements(_text(path)), _statements(readable(gm))
    if before == now:
        return []
    changes = [
        d for d in difflib.unified_diff(before, now, lineterm="", n=0) if d[0] in "+-" and d[:3] not in ("+++", "---")
    ]
    more = [f"… and {len(changes) - 12} lines more"] if len(changes) > 12 else []
    return [f"{path.name}: {len(changes)} lines differ (- in the dump, + here)", *changes[:12], *more]


def _statements(text: str) -> list[str]:
    """A graph's calls: how it takes its inputs and packs its outputs is a matter of its caller."""
    lines = [line.strip() for line in text.splitlines()]
    calls = [line for line in lines if line and "fx_pytree" not in line and not line.startswith("def ")]
    return [_PACKED.sub(r"return \1", line.partition(";  ")[0]) for line in calls]


_PACKED = re.compile(r"return pytree\.tree_unflatten\((.*), self\._out_spec\)")


def _arena(raw: Mapping[str, Any], dumped: Plan, timer: _Timer) -> Replayed:
    arguments: dict[str, Any] = dict(raw)
    for name in ("forward", "backward"):
        arguments[name] = _body(raw[name])
    arguments["links"] = [Link(**link) for link in raw["links"]]
    # Dumps before plans of version 2 had other keys, and another word for prefetch buffers.
    sides = {"fw": Side.FORWARD, "bw": Side.BACKWARD}
    split = {key: key.partition(":") for key in raw["layer_of"]}
    arguments["layer_of"] = {
        key_of(sides[side], name) if colon else key: raw["layer_of"][key] for key, (side, colon, name) in split.items()
    }
    arguments["allocator"] = Allocator(raw.get("allocator", ""))
    layout = plan_arena(**arguments)
    before = {"segments": [asdict(s) for s in dumped.segments], "peak": dumped.predicted_peak}
    now = {"segments": [asdict(s) for s in layout.segments], "peak": layout.peak}
    differences = _fields("", before, now)
    dumped_as = {(b.side, b.name): b for b in dumped.buffers}
    places = ((b, dumped_as.get((b.side, b.name))) for b in layout.buffers)
    differences += [f"{b.name} of the {b.side}: {then} in the dump, {b} here" for b, then in places if then != b]
    return timer.done("arena", f"{len(layout.buffers)} buffers in {len(layout.segments)} segments", differences)


def _body(raw: Mapping[str, Any]) -> Any:
    storages = {name: Storage(**{**s, "kind": Kind(s["kind"])}) for name, s in raw["storages"].items()}
    strides = tuple(None if s is None else tuple(s) for s in raw["strides"])
    rest: dict[str, Any] = {
        "prefetch_buffers" if k == "landings" else k: tuple(v) if isinstance(v, list) else v
        for k, v in raw.items()
        if k not in ("steps", "storages", "outputs", "inputs", "strides")
    }
    return Body(raw["steps"], storages, tuple(raw["outputs"]), tuple(raw["inputs"]), strides, **rest)
