"""What memo takes of the processor: its engine for each copy, and a whole step beside Inductor's.

    python -m bench.bookkeeping

Microseconds, the fastest of many rounds, on a CUDA that does nothing: starting an offload and a prefetch, and putting
the computation after each; and steps of a model whose kernels take next to nothing (`bench.small_steps`). What CUDA's
own calls take comes on top: `bench.probes step` tells that, on a card.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import small_steps
from bench.common import save
from bench.idle_cuda import IdleCuda
from memo_compile.runtime.streams import StreamEngine

ROUNDS, COPIES = 100, 100
CPU = torch.device("cpu")
SLICES = {"dense": torch.zeros(16, 8), "rows of heads": torch.zeros(1, 4, 16, 8)[:, :, :6]}


def measured(name: str) -> dict[str, Any]:
    """One row: microseconds of each call for one kind of slice."""
    engine, x = StreamEngine(CPU, cuda=IdleCuda()), SLICES[name]
    lease = torch.zeros(1 << 16, dtype=torch.uint8)
    calls = {"offload": engine.offload, "offload_wait": engine.offload_wait}
    calls |= {"prefetch": engine.prefetch, "prefetch_wait": engine.prefetch_wait}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        taken = dict.fromkeys(calls, 0.0)
        for _ in range(COPIES):
            for call, fn in calls.items():
                taken[call] += _seconds(fn, x, lease)
        best = {call: min(best[call], 1e6 * taken[call] / COPIES) for call in calls}
    return {"slice": name, **best, "all": sum(best.values())}


def _seconds(fn: Callable[..., None], x: torch.Tensor, lease: torch.Tensor) -> float:
    started = time.perf_counter()
    fn(x, lease, 0)
    return time.perf_counter() - started


def copies_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each kind of slice."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(h.replace("_", " ") for h in heads) + " |", "|---" * len(heads) + "|"]
    lines += [f"| {r['slice']} | " + " | ".join(f"{r[h]:.1f}" for h in heads[1:]) + " |" for r in rows]
    return f"Microseconds a copy, the fastest of {ROUNDS} rounds of {COPIES}.\n\n" + "\n".join(lines)


def steps_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each side."""
    heads = ["side", "copies", "µs a step", "× Inductor's", "at the median", *small_steps.PARTS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in rows:
        figures = [f"{r['us']:.0f}", f"{r['times']:.2f}", f"{r['times_median']:.2f}"]
        shares = [f"{r[part]:.0%}" for part in small_steps.PARTS]
        lines.append("| " + " | ".join([r["side"], str(r["copies"]), *figures, *shares]) + " |")
    s = small_steps
    return (
        f"A step of {s.LAYERS} layers, {s.TOKENS} tokens wide {s.WIDTH}, forward and backward: processor time, the "
        f"fastest of {s.ROUNDS} rounds of {s.STEPS} in turns; and shares of it while a profiler looks on, which makes "
        "Python's calls dearer than they are.\n\n" + "\n".join(lines)
    )


def main() -> None:
    """Measure, and write the tables."""
    copies, steps = [measured(name) for name in SLICES], small_steps.rows()
    table = copies_table(copies) + "\n\n" + steps_table(steps)
    save("bookkeeping", "python -m bench.bookkeeping", [*copies, *steps], table)
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
