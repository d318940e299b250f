"""What one plan for a range of lengths costs: its steps and those of a plan for the length alone, in turn, in one run.

    python -m bench.lengths [--model llama] [--layers 4] [--lengths 2048 1536 1024 600] [--budget 0.5] [--steps 9]

The first length is the first that is compiled: it, or the next power of two, ends the range.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

import memo_compile
from bench.common import MODELS, VOCABULARY, make, save, train_step
from memo_compile.logs import MIB


def _compiled(model: torch.nn.Module, budget: float | str, *, dynamic: bool) -> Any:
    options = {"memory_budget": budget, "lengths": "range" if dynamic else "exact"}
    return torch.compile(model, backend="memo", options=options, dynamic=dynamic)


def _timed(model: torch.nn.Module, fn: Any, x: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    train_step(fn, x)
    return time.perf_counter() - started


def paired(model: torch.nn.Module, ranged: Any, budget: float | str, length: int, steps: int) -> dict[str, Any]:
    """One row: medians of alternating steps at one length, peaks, and of what plan."""
    x = torch.randint(0, VOCABULARY, (1, length))
    train_step(ranged, x)
    plan = next(p for p in reversed(memo_compile.plans()) if p.range)
    alone = _compiled(model, budget, dynamic=False)
    train_step(alone, x)
    exact = memo_compile.plans()[-1]
    assert not exact.range, "the length alone was not compiled"
    ways = {"exact": alone, "ranged": ranged}
    row: dict[str, Any] = {"length": length, "range": plan.range, "moved": plan.offloaded_bytes + plan.recomputed_bytes}
    for how, fn in ways.items():
        model.zero_grad(set_to_none=True)
        row[f"{how}_peak"] = memo_compile.measure_peak(train_step, fn, x)
    seconds: dict[str, list[float]] = {how: [] for how in ways}
    for _ in range(steps):
        for how, fn in ways.items():
            seconds[how].append(_timed(model, fn, x))
    for how, taken in seconds.items():
        row[f"{how}_seconds"] = statistics.median(taken)
    ratios = [r / e for r, e in zip(seconds["ranged"], seconds["exact"], strict=True)]
    planned = {"ranged_planned": plan.predicted_peak, "exact_planned": exact.predicted_peak}
    return row | planned | {"ratio": statistics.median(ratios)}


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama", choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 1536, 1024, 600])
    parser.add_argument("--budget", default=0.5, type=lambda text: text if text == "min" else float(text))
    parser.add_argument("--steps", type=int, default=9)
    a = parser.parse_args()
    torch._dynamo.config.recompile_limit = 4 * len(a.lengths)
    model, _ = make(a.model, a.layers, max(a.lengths))
    ranged = _compiled(model, a.budget, dynamic=True)
    rows = []
    for length in a.lengths:
        rows.append(paired(model, ranged, a.budget, length, a.steps))
        table = _table(rows)
        save("lengths", "python -m bench.lengths " + " ".join(sys.argv[1:]), rows, table)
    print(table)


def _table(rows: list[dict[str, Any]]) -> str:
    heads = ("length", "range", "alone ms", "range ms", "ratio of pairs", "alone MiB", "range MiB", "range planned MiB")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [
        f"| {r['length']} | {r['range']} | {r['exact_seconds'] * 1000:.0f} | {r['ranged_seconds'] * 1000:.0f} "
        f"| {r['ratio']:.3f} | {r['exact_peak'] / MIB:.1f} | {r['ranged_peak'] / MIB:.1f} "
        f"| {r['ranged_planned'] / MIB:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
