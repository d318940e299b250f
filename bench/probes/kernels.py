"""Probes of where a step's time goes, on the device and on the processor, and the profile of this device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.probes.steps import by_memo, wide_step
from bench.probes.timing import Answer, Scene, issued, on_cuda

KINDS_OF_KERNELS = {
    "copies": ("memcpy", "memset"),
    "attention": ("fmha", "flash", "attention", "cudnn_generated"),
    "matmuls": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "fused": ("triton",),
}


def step(scene: Scene) -> Answer:
    """A step of a wide model of two layers at 8K tokens: kernels by kind, gaps, and how long issuing it takes.

    By Inductor, by memo with room for all, and by memo with half. Milliseconds; `gaps` is when no kernel ran, `issued`
    how long the processor was busy with the step, `memo_ops` the part of it that memo's own ops took (while a profiler
    looks on), and `times_plain` how much more than Inductor's step it is, for which 1.05 is the goal.
    """
    makes: dict[str, Callable[[Any], Any]] = {
        scene.plain: lambda trained: torch.compile(trained, backend=scene.plain, dynamic=False),
        "memo-auto": by_memo(scene),
        "memo-0.5": by_memo(scene, memory_budget=0.5),
    }
    answer: Answer = {}
    for name, make in makes.items():
        run = wide_step(make, 2, scene.size(8192), scene)
        for _ in range(3):
            run()
        answer[name] = {"issued": 1e3 * min(issued(run, scene) for _ in range(3)), **_kernels(run, scene)}
    for found in answer.values():
        found["times_plain"] = found["issued"] / answer[scene.plain]["issued"]
    return answer


def _kernels(run: Callable[[], Any], scene: Scene) -> Answer:
    from torch.profiler import ProfilerActivity, profile

    scene.synchronize()
    activities = [ProfilerActivity.CPU, *([] if scene.tiny else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as profiler:
        run()
        scene.synchronize()
    events: Any = profiler.events()
    on_device = [e for e in events if "CUDA" in str(e.device_type)]
    spans = sorted((e.time_range.start, e.time_range.end, _kind(e.name)) for e in on_device)
    by_kind: Answer = dict.fromkeys((*KINDS_OF_KERNELS, "other"), 0.0)
    for start, end, kind in spans:
        by_kind[kind] += (end - start) / 1e3
    kernels = [(start, end) for start, end, kind in spans if kind != "copies"]
    return {"kernels": len(kernels), **by_kind, "gaps": _gaps(kernels) / 1e3, **_own_ops(events)}


def _own_ops(events: Sequence[Any]) -> Answer:
    """How many of memo's ops ran, and for how long; one within another counts once."""
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.name.startswith("memo::") and "CUDA" not in str(e.device_type)
    )
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"memo_ops": busy / 1e3, "memo_ops_count": len(spans)}


def _kind(name: str) -> str:
    low = name.lower()
    return next((kind for kind, words in KINDS_OF_KERNELS.items() if any(word in low for word in words)), "other")


def _gaps(spans: Sequence[tuple[float, float]]) -> float:
    """Time between the first start and the last end in which nothing ran.

    >>> _gaps([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    2.0
    """
    idle, until = 0.0, min((start for start, _ in spans), default=0.0)
    for start, end in sorted(spans):
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle


def profile(scene: Scene) -> Answer:
    """What `memo doctor --measure` finds, and how long it takes."""
    from memo_compile.hardware.calibration import measure

    on_cuda(scene)
    started = time.perf_counter()
    found = measure("cuda")
    return {"took_s": time.perf_counter() - started, "profile": asdict(found)}
