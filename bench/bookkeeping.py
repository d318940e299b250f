"""What the stream engine itself takes of the processor for each copy, on a CUDA that does nothing.

    python -m bench.bookkeeping

Microseconds, the fastest of many rounds: starting an offload and a prefetch, and putting the computation after each.
What CUDA's own calls take comes on top: `bench.probes step` tells that, on a card.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.common import save
from memo_compile.runtime.streams import StreamEngine

ROUNDS, COPIES = 100, 100
CPU = torch.device("cpu")
SLICES = {"dense": torch.zeros(16, 8), "rows of heads": torch.zeros(1, 4, 16, 8)[:, :, :6]}


class _Idle:
    """A stream, or an event."""

    cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any) -> None:
        pass


class _Cuda:
    """What `StreamEngine` asks of `torch.cuda`, done by nobody."""

    Event = _Idle

    def __init__(self) -> None:
        self.stream = _Idle()

    def Stream(self, device: torch.device) -> _Idle:  # noqa: N802
        return self.stream

    def current_stream(self, device: torch.device) -> _Idle:
        return self.stream

    def capturing(self) -> bool:
        return False

    def on(self, stream: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def copy(self, *what: Any) -> None:
        pass

    def copy_planes(self, *what: Any) -> bool:
        return True


def measured(name: str) -> dict[str, Any]:
    """One row: microseconds of each call for one kind of slice."""
    engine, x = StreamEngine(CPU, cuda=_Cuda()), SLICES[name]
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


def main() -> None:
    """Measure, and write the table."""
    rows = [measured(name) for name in SLICES]
    heads = list(rows[0])
    lines = ["| " + " | ".join(h.replace("_", " ") for h in heads) + " |", "|---" * len(heads) + "|"]
    lines += [f"| {r['slice']} | " + " | ".join(f"{r[h]:.1f}" for h in heads[1:]) + " |" for r in rows]
    table = "Microseconds a copy, the fastest of 100 rounds of 100.\n\n" + "\n".join(lines)
    save("bookkeeping", "python -m bench.bookkeeping", rows, table)
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
