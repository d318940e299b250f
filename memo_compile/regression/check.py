"""What `memo check` does: plan targets on fake tensors for a named device, and compare them with a baseline.

Arenas are real, from dry runs of Inductor, so that a machine without a GPU can tell. One thread is planned for,
whatever the machine has, so that figures are the same everywhere.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from memo_compile.codegen.arena.layout import ALIGNMENT
from memo_compile.errors import InvalidBaseline, InvalidOption
from memo_compile.hardware.profiles import PROFILES, resolve
from memo_compile.logs import logger
from memo_compile.placement import Buffer
from memo_compile.placement.bounds import lower_bound
from memo_compile.regression.baseline import Baseline, Change, Figures, SavedTensor, compare, load, save
from memo_compile.schema import ActivationPlan, Cause, Plan
from memo_compile.trace.targets import load_target, made_of_fakes

log = logger(__name__)

HOST_SHARE = 0.5  # of the profile's host memory, as host_budget="auto" takes of what is free


def check(
    targets: Mapping[str, Callable[[], Any]],
    path: Path,
    allowed: Mapping[str, float],
    *,
    hardware: str | None = None,
    update: bool = False,
) -> list[Change]:
    """Plan `targets` and compare them with the baseline in `path`, or write what they come to there.

    Args:
        targets: functions by name, each returning a model and its inputs; see `InvalidTarget`.
        allowed: the tolerance of each metric; see `memo_compile.regression.baseline.tolerances`.
        hardware: a profile's name; None: the baseline's.
        update: write the baseline; other targets in it stay.

    Raises:
        InvalidBaseline: it is missing, unreadable, for other hardware, or lacks a target.
        InvalidTarget, MemoError: a target that cannot be planned.
    """
    old = load(path) if path.exists() or not update else None
    hardware = hardware or (old.hardware if old is not None else None)
    if hardware is None:
        raise InvalidOption("--hardware", None, f"the device to plan for: {', '.join(PROFILES)}, or a profile's file")
    if not update:
        assert old is not None
        _fits(old, path, targets, hardware)
    figures = {name: measure(name, make, hardware) for name, make in targets.items()}
    if update:
        kept = old.targets if old is not None and old.hardware == hardware else {}
        save(Baseline(hardware, _torch_version(), {**kept, **figures}), path)
        return []
    assert old is not None
    return [change for name, now in figures.items() for change in compare(name, old.targets[name], now, allowed)]


def _fits(baseline: Baseline, path: Path, targets: Mapping[str, Any], hardware: str) -> None:
    if baseline.hardware != hardware:
        raise InvalidBaseline(f"{path} is for {baseline.hardware}, not {hardware}. Keep one file for each.")
    missing = [name for name in targets if name not in baseline.targets]
    if missing:
        raise InvalidBaseline(f"{path} has no figures of {', '.join(missing)}. Add them with --update, and commit it.")
    if baseline.torch != _torch_version():
        log.warning("%s was made with torch %s, this is %s", path, baseline.torch, _torch_version())


def _torch_version() -> str:
    return torch.__version__.partition("+")[0]


def location(target: str) -> tuple[str, int]:
    """File, relative to the current folder where it lies there, and line of a target's function."""
    function = inspect.unwrap(load_target(target))
    path = inspect.getsourcefile(function) or "?"
    return _portable(path), inspect.getsourcelines(function)[1]


def measure(target: str, make: Callable[[], Any], hardware: str) -> Figures:
    """Plan what `make()` returns for the device that `hardware` names.

    Raises:
        InvalidTarget: `make` fails, or returns something else than a model and its inputs.
        MemoError: the model cannot be planned, or a mistake in its options.
    """
    from memo_compile.codegen.planned_step import plan_step  # takes a second

    threads = torch.get_num_threads()
    profile = resolve(hardware)
    torch.set_num_threads(1)
    try:
        _warm_up()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model, args, kwargs, options = made_of_fakes(target, make, mode)
        host = int(profile.host_memory * HOST_SHARE)
        options = {"host_budget": host, **options, "hardware": hardware}
        calibration = _calibration_seconds()
        started = time.process_time()
        step = plan_step(mode, model, args, kwargs, options)
        seconds = time.process_time() - started
    finally:
        torch.set_num_threads(threads)
    plans = [g.plan for g in step.graphs]
    tensors = tuple(_tensor(a, i if len(plans) > 1 else None) for i, p in enumerate(plans) for a in p.activations)
    metrics = {
        "peak": max(p.predicted_peak for p in plans),
        "arena": max(p.arena_bytes / p.lower_bound if p.lower_bound else 1.0 for p in plans),
        "coverage": min(p.coverage for p in plans),
        "host": sum(p.host_bytes for p in plans),
        "out": sum(g.bytes_out for g in step.graphs),
        "in": sum(g.bytes_in for g in step.graphs),
        "flops": sum(p.recomputed_flops for p in plans),
        "step": sum(p.predicted_seconds for p in plans),
        "breaks": len(step.breaks),
        "unsliceable": sum(t.whole > 0 for t in tensors),
        "planning": seconds / calibration,
    }
    notes = {
        "arena": tuple(line for p in plans for line in _loose_segments(p)),
        "breaks": step.breaks,
        "unsliceable": tuple(f"the token axis ends at {s.op}, {_portable(s.source)}" for p in plans for s in p.stops),
    }
    return Figures({k: _rounded(v) for k, v in metrics.items()}, tensors, {k: v for k, v in notes.items() if v})


@cache
def _warm_up() -> None:
    """What is done once in a process (imports, tables of lowerings) is no target's planning."""
    from memo_compile.codegen.planned_step import plan_step  # takes a second
    from memo_compile.models import Llama, LlamaConfig

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = Llama(LlamaConfig(vocab=64, layers=1, width=32, heads=4, kv_heads=2, ffn=96))
        x = torch.randint(0, 64, (1, 128))
    plan_step(mode, model, (x,), {"labels": x}, {"memory_budget": "min"})


def _calibration_seconds() -> float:
    """Processor seconds of a fixed piece of work like a compiler's: dicts, tuples and sorting. The fastest of five."""
    return min(_calibrate() for _ in range(5))


def _calibrate() -> float:
    started = time.process_time()
    table: dict[tuple[int, int], list[int]] = {}
    for i in range(60_000):
        table.setdefault((i * 7919 % 1009, i % 13), []).append(i)
    sorted(table.items(), key=lambda item: (-len(item[1]), item[0]))
    return time.process_time() - started


def _tensor(a: ActivationPlan, graph: int | None) -> SavedTensor:
    name = a.name if graph is None else f"{graph}:{a.name}"
    kept, offloaded, recomputed = (a.share(rows) for rows in (a.kept, a.offloaded, a.recomputed))
    whole = a.bytes if a.cause is Cause.NO_TOKEN_AXIS else 0
    return SavedTensor(
        name=name,
        source=_portable(a.source),
        bytes=a.bytes,
        kept=kept,
        offloaded=offloaded,
        recomputed=recomputed,
        whole=whole,
    )


def _portable(source: str) -> str:
    """A source line without this machine's folders."""
    here = os.getcwd() + os.sep
    if source.startswith(here):
        return source[len(here) :]
    _, package, inside = source.rpartition("site-packages" + os.sep)
    if package:
        return inside
    return source.rpartition(os.sep)[2] if os.path.isabs(source.partition(":")[0]) else source


def _loose_segments(plan: Plan) -> Iterator[str]:
    """Segments that are larger than the bytes that live in them, the loosest first, with what lies at their end."""
    loose = []
    for segment in plan.segments:
        inside = [b for b in plan.buffers if b.segment == segment.name]
        bound = lower_bound([Buffer(b.name, b.size, b.start, b.end) for b in inside], ALIGNMENT)
        if segment.size > bound:
            highest = max(inside, key=lambda b: (b.offset + b.size, b.side, b.name))
            loose.append((segment.size - bound, segment, bound, highest))
    for _, segment, bound, highest in sorted(loose, key=lambda entry: (-entry[0], entry[1].name)):
        yield (
            f"{segment.name} holds {segment.size:,} bytes for at most {bound:,} live; "
            f"{highest.name} of the {highest.side} ({highest.size:,} bytes) lies at its end"
        )


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
