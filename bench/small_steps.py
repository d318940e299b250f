"""What a whole training step takes of the processor, by memo and by Inductor: kernels as small as launching them is.

The model is so small that its kernels take next to nothing, and copies are queued on a CUDA that does nothing
(`bench.idle_cuda`): what is left is what Python, torch and memo do for a step, which a device that is busy hides and
one that is not waits for. Sides take turns; processor time of one thread. Gradients are of no use here, since nothing
is copied.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import memo_compile
from bench.idle_cuda import IdleCuda
from memo_compile.models import Llama, LlamaConfig
from memo_compile.runtime import ops
from memo_compile.runtime.streams import StreamEngine

LAYERS, TOKENS, WIDTH, VOCABULARY = 8, 64, 32, 64
ROUNDS, STEPS, WARM = 60, 5, 20
PARTS = ("kernels", "memo's calls", "emitted lines", "allocations and views", "torch around it")
Step = Callable[[], None]


@dataclass(frozen=True)
class Side:
    """A step, and how many copies it starts."""

    name: str
    step: Step
    copies: int


def idle_copies() -> AbstractContextManager[Any]:
    """Within, copies are queued as on a GPU, and nothing is copied."""
    return mock.patch.object(ops, "_make_engine", lambda device: StreamEngine(device, ops.recorder(), cuda=IdleCuda()))


def rows() -> list[dict[str, Any]]:
    """One row a side: microseconds of a step, its ratio to Inductor's, and where they go."""
    torch.set_num_threads(1)
    memo_compile.reset()
    with idle_copies():
        sides = [_side("inductor", backend="inductor"), _side("memo", backend="memo")]
        sides += [_side(f"memo, {b}", backend="memo", options={"memory_budget": b}) for b in (0.5, "min")]
        taken = _in_turns(sides)
        plain = taken["inductor"]
        return [
            {
                "side": side.name,
                "copies": side.copies,
                "us": min(taken[side.name]),
                "times": min(taken[side.name]) / min(plain),
                "times_median": statistics.median(a / b for a, b in zip(taken[side.name], plain, strict=True)),
                **_parts(side.step),
            }
            for side in sides
        ]


def _side(name: str, **how: Any) -> Side:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=VOCABULARY, layers=LAYERS, width=WIDTH, heads=4, kv_heads=2, ffn=3 * WIDTH))
    x = torch.randint(0, VOCABULARY, (1, TOKENS))
    compiled = torch.compile(model, dynamic=False, **how)

    def step() -> None:
        compiled(x, labels=x).backward()
        for parameter in parameters:
            parameter.grad = None

    parameters = list(model.parameters())
    step()
    before = memo_compile.transfer_stats()
    step()
    after = memo_compile.transfer_stats()
    return Side(name, step, after.copies_out + after.copies_in - before.copies_out - before.copies_in)


def _in_turns(sides: list[Side]) -> dict[str, list[float]]:
    """Microseconds of a step, round by round."""
    taken: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        for _ in range(WARM):
            side.step()
    for _ in range(ROUNDS):
        for side in sides:
            started = time.thread_time()
            for _ in range(STEPS):
                side.step()
            taken[side.name].append(1e6 * (time.thread_time() - started) / STEPS)
    return taken


def _parts(step: Step) -> dict[str, float]:
    """Shares of a step while a profiler looks on, which makes calls of Python dearer than they are."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(WARM):
        step()
    profile.disable()
    found = dict.fromkeys(PARTS, 0.0)
    stats: Any = pstats.Stats(profile)
    for (path, _, function), (_, _, own, _, _) in stats.stats.items():
        found[_part(path, function)] += own
    total = sum(found.values())
    return {part: seconds / total for part, seconds in found.items()}


def _part(path: str, function: str) -> str:
    if path == "~":
        if any(word in function for word in ("_empty_strided", "_reinterpret_tensor", "assert_size_stride", "_pool>")):
            return "allocations and views"
        if any(word in function for word in ("kernel", "torch.mm", "torch._ops.aten", "torch.addmm")):
            return "kernels"
        return "memo's calls" if "torch._ops.memo" in function else "torch around it"
    if "/memo_compile/runtime/" in path or "/memo_compile/codegen/" in path or path.endswith("idle_cuda.py"):
        return "memo's calls"
    return "emitted lines" if function == "call" and "site-packages" not in path else "torch around it"
