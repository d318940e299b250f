"""Do copies hide behind the computation? Waits beside the seconds of copies, and bytes moved beside the plan's.

    python -m bench.transfers [--layers 4] [--tokens 2048] [--steps 9] [--threads 1]

The thread engine copies on processor cores: computation must leave it one, so that `--threads` is below their number.
Every step moves the same bytes in the same order; what differs is how long the machine makes threads wait for a core.
So the figures are those of the step with the least wait, with the median beside it. Where the plan predicts no stall,
waits should be under 5 % of the copies' time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import memo_compile
from bench.common import make, save, train_step
from memo_compile.logs import MIB
from memo_compile.runtime.engine import Span
from memo_compile.runtime.ops import recorder

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gpt", {"memory_budget": 0.5, "recompute": False}),
    ("gpt", {"offload": "all"}),
    ("llama", {"memory_budget": 0.5, "recompute": False}),
)


def traced(fn: Any, x: torch.Tensor) -> list[Span]:
    """The spans of one step."""
    recorder().trace = spans = []
    try:
        train_step(fn, x)
    finally:
        recorder().trace = None
    return spans


def seconds_of(spans: list[Span], *kinds: str) -> float:
    """The sum of the spans of these kinds."""
    return sum(s.seconds for s in spans if s.kind in kinds)


def step_of(model: torch.nn.Module, fn: Any, x: torch.Tensor) -> dict[str, float]:
    """Seconds and bytes of one step."""
    model.zero_grad(set_to_none=True)
    before = memo_compile.transfer_stats()
    spans = traced(fn, x)
    after = memo_compile.transfer_stats()
    return {
        "wait_seconds": seconds_of(spans, "wait D2H", "wait H2D"),
        "copy_seconds": seconds_of(spans, "D2H", "H2D"),
        "step_seconds": seconds_of(spans, "forward", "backward"),
        "moved_out": after.bytes_out - before.bytes_out,
        "moved_in": after.bytes_in - before.bytes_in,
        "copies": after.copies_out + after.copies_in - before.copies_out - before.copies_in,
    }


def measured(name: str, options: dict[str, Any], layers: int, tokens: int, steps: int) -> dict[str, Any]:
    """One row: a model with options."""
    torch._dynamo.reset()
    memo_compile.reset()
    model, x = make(name, layers, tokens)
    with tempfile.TemporaryDirectory() as folder:
        fn = torch.compile(model, backend="memo", options={**options, "dump": folder})
        train_step(fn, x)
        (report,) = Path(folder).glob("*/report.json")
        streams = json.loads(report.read_text())["streams"]
    (plan,) = memo_compile.plans()
    taken = [step_of(model, fn, x) for _ in range(steps)]
    best = min(taken, key=lambda row: row["wait_seconds"] / row["copy_seconds"])
    return {
        "model": name,
        "options": options,
        **best,
        "waits": best["wait_seconds"] / best["copy_seconds"],
        "median_waits": statistics.median(row["wait_seconds"] / row["copy_seconds"] for row in taken),
        "planned": plan.offloaded_bytes,
        "predicted_stall_seconds": sum(streams["stalls"].values()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | | copies | moved out MiB | moved in | planned | copying ms | waiting ms | waits / copies | median "
        "| stalls predicted ms | step ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["model"], ", ".join(f"{k}={v}" for k, v in r["options"].items()), str(r["copies"])]
        cells += [f"{r[key] / MIB:.2f}" for key in ("moved_out", "moved_in", "planned")]
        cells += [f"{r[key] * 1000:.2f}" for key in ("copy_seconds", "wait_seconds")]
        cells += [f"{r[key]:.1%}" for key in ("waits", "median_waits")]
        cells += [f"{r['predicted_stall_seconds'] * 1000:.2f}", f"{r['step_seconds'] * 1000:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, options in CASES:
        rows.append(measured(name, options, arguments.layers, arguments.tokens, arguments.steps))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    save("transfers", " ".join(["python -m bench.transfers", *sys.argv[1:]]), rows, table(rows))


if __name__ == "__main__":
    main()
