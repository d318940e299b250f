"""One row: a few training steps of one model at one length by one peer, and what they took.

    python -m bench.measurement FILE   # reads a case as a line of JSON, writes the row to the file

Figures: tokens/s, MFU with causal attention, peak bytes allocated and reserved, host bytes, seconds to compile, loss.
`bench.worker` gives each row a process of its own, where nothing is left of other peers, and empty compiler caches, so
that each compiles cold. The first step compiles, and the fastest of those after it counts; the peak is over them all.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import memo_compile
from bench import roster
from bench.models import head_of, make_model, model_flops
from bench.provenance import made
from memo_compile.errors import BudgetTooSmall
from memo_compile.hardware.profiles import built_in
from memo_compile.runtime.ops import pool

SEED = 1  # of the tokens
SCRATCH = 2**28  # bytes that libraries and rounding may hold between steps; what is more was kept by the peer


@dataclass(frozen=True)
class Case:
    """One row to measure. `limit` is the bytes that a CPU stands for as a device; 0 for the device's own."""

    model: str
    layers: int
    tokens: int
    peer: str
    budget: int = 0
    limit: int = 0
    tiny: bool = False
    device: str = "cuda"
    steps: int = 2  # timed, after one that compiles

    @property
    def key(self) -> str:
        """What tells its row from others of the same card."""
        return f"{self.model}/{self.layers}/{self.tokens}/{self.peer}"


def measure(case: Case) -> dict[str, Any]:
    """One row; `failed` says why where there are no figures."""
    torch._dynamo.reset()
    memo_compile.reset()
    row = {**asdict(case), **made(case.device), "code": roster.code(case.model, case.peer)}
    try:
        return {**row, **_measure(case)}
    except (torch.OutOfMemoryError, memo_compile.MemoError, NotImplementedError, ImportError, RuntimeError) as error:
        return {**row, **_failure(error)}


def _failure(error: Exception) -> dict[str, Any]:
    cause: BaseException = getattr(error, "inner_exception", error)
    row: dict[str, Any] = {"failed": type(cause).__name__, "said": str(cause)[:400]}
    if isinstance(cause, BudgetTooSmall):
        row["least"] = cause.least
    return row


class _Steps:
    """Training steps of a case, and how long the optimizer takes of each."""

    def __init__(self, case: Case) -> None:
        self.trained = make_model(case.model, case.layers, case.tokens, case.device, case.tiny)
        self.cuda = case.device == "cuda"
        generator = torch.Generator(case.device).manual_seed(SEED)
        vocabulary = head_of(self.trained).weight.shape[0]
        self.x = torch.randint(0, vocabulary, (1, case.tokens), device=case.device, generator=generator)
        learned = [p for p in self.trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=self.cuda)
        self.run = roster.make(case.peer, case.budget)(self.trained)
        self.losses: list[torch.Tensor] = []
        self.marks: list[list[Any]] = []

    def __call__(self) -> None:
        """One step. Nothing waits for the device, so that the next is issued while this one runs, as in training."""
        marks = [self._mark()]
        loss = self.run(self.x, self.x)
        loss.backward()
        self.losses.append(loss.detach())
        marks.append(self._mark())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.marks.append([*marks, self._mark()])

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def held(self) -> int:
        """Bytes of parameters, optimizer state and tokens, which stay between steps whatever the peer."""
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
        kept = [*self.trained.parameters(), *self.trained.buffers(), *state, self.x]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    def times(self, last: int) -> list[tuple[float, float]]:
        """Seconds of each of the last steps, and of the model in it."""
        if not self.cuda:
            return [(end - start, trained - start) for start, trained, end in self.marks[-last:]]
        torch.cuda.synchronize()
        return [
            (start.elapsed_time(end) / 1e3, start.elapsed_time(trained) / 1e3)
            for start, trained, end in self.marks[-last:]
        ]


def _measure(case: Case) -> dict[str, Any]:
    step = _Steps(case)
    started = time.perf_counter()
    step()
    if step.cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    held, peak, reserved, before = (_on_cuda if step.cuda else _on_cpu)(step, case.steps)
    if case.limit and peak > case.limit:
        return {"failed": "OutOfMemory", "said": f"{peak} bytes held, the device stands for {case.limit}", "peak": peak}
    seconds, model_seconds = min(step.times(case.steps))
    row: dict[str, Any] = {
        "seconds": seconds,
        "model_seconds": model_seconds,  # without the optimizer
        "tokens_per_second": case.tokens / seconds,
        "mfu": model_flops(step.trained, case.tokens) / seconds / _peak_flops(step.cuda),
        "peak": peak,  # above parameters and optimizer state
        "allocated": held + peak,
        "reserved": reserved,
        "host_bytes": pool().held_bytes + _pinned_elsewhere(step.cuda),
        "pinned_elsewhere": _pinned_elsewhere(step.cuda),
        "first_step_seconds": first,
        "compile_seconds": max(0.0, first - seconds),
        "losses": [float(v) for v in step.losses],
    }
    return row | _planned(case, before)


def _on_cuda(step: _Steps, steps: int) -> tuple[int, int, int, Any]:
    """Run the steps: bytes held before, peak above them, peak reserved, transfers before.

    Blocks of host memory stay, as they do in training. One step is timed as it comes; where there are more, what only
    compiling needed is given back before, and the first of them takes memory anew.
    """
    gc.collect()
    if steps > 1:
        torch.cuda.empty_cache()
    held = min(torch.cuda.memory_allocated(), step.held() + SCRATCH)
    torch.cuda.reset_peak_memory_stats()
    before = memo_compile.transfer_stats()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return held, torch.cuda.max_memory_allocated() - held, torch.cuda.max_memory_reserved(), before


def _on_cpu(step: _Steps, steps: int) -> tuple[int, int, int, Any]:
    """The same; the peak comes from a step of its own, since recording allocations takes time."""
    peak = memo_compile.measure_peak(step)
    before = memo_compile.transfer_stats()
    for _ in range(steps):
        step()
    return 0, peak, 0, before


def _planned(case: Case, before: Any) -> dict[str, Any]:
    """What memo said of the step."""
    plans = memo_compile.plans()
    if not roster.is_memo(case.peer) or not plans:
        return {}
    plan, moved = plans[-1], memo_compile.transfer_stats()
    return {
        "plans": len(plans),
        "budget": plan.budget,
        "predicted_peak": plan.predicted_peak,
        "predicted_seconds": plan.predicted_seconds,
        "predicted_reserved": plan.predicted_reserved,
        "planned_host_bytes": plan.host_bytes,
        "moved_out": (moved.bytes_out - before.bytes_out) // case.steps,
        "planned_out": plan.offloaded_bytes,
        "recomputed_share": plan.recomputed_flops_share,
        "coverage": plan.coverage,
    }


def _pinned_elsewhere(cuda: bool) -> int:
    """Bytes that torch has page-locked at most, for anyone but memo, whose blocks are its own."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)) if cuda else 0


def _peak_flops(cuda: bool) -> float:
    """The datasheet's, so that MFU means the same whatever was measured on this machine."""
    return built_in("cuda").flops("bfloat16") if cuda else built_in("cpu").flops("float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait for a case, with all imports done; nothing touches the device before it is there."""
    import torch._inductor.compile_fx  # noqa: F401  (seconds that no row should pay for)

    (path,) = sys.argv[1:] if arguments is None else arguments
    line = sys.stdin.readline()
    if line.strip():
        beside = Path(path).with_suffix(".part")
        beside.write_text(json.dumps(measure(Case(**json.loads(line)))))
        os.replace(beside, path)  # the file is there when the row is whole
    return 0


if __name__ == "__main__":
    sys.exit(main())
