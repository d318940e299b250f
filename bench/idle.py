"""What memo costs where it has nothing to do: steps of memo without a budget and of Inductor, in turn, in one run.

python -m bench.idle [--layers 8] [--tokens 2048] [--steps 15]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

import memo_compile
from bench.common import MODELS, make, save, train_step
from memo_compile.logs import MIB


def paired(name: str, layers: int, tokens: int, steps: int) -> dict[str, Any]:
    """Medians of alternating steps of both backends over one model."""
    torch._dynamo.reset()
    model, x = make(name, layers, tokens)
    ways = {how: torch.compile(model, backend=how) for how in ("inductor", "memo")}
    seconds: dict[str, list[float]] = {how: [] for how in ways}
    row: dict[str, Any] = {"model": name}
    for how, fn in ways.items():
        train_step(fn, x)
        model.zero_grad(set_to_none=True)
        row[f"{how}_peak"] = memo_compile.measure_peak(train_step, fn, x)
    for _ in range(steps):
        for how, fn in ways.items():
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            train_step(fn, x)
            seconds[how].append(time.perf_counter() - started)
    for how, all_of_it in seconds.items():
        row[f"{how}_seconds"] = statistics.median(all_of_it)
    row["ratio"] = statistics.median(m / i for m, i in zip(seconds["memo"], seconds["inductor"], strict=True))
    return row


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    rows = [paired(name, arguments.layers, arguments.tokens, arguments.steps) for name in arguments.models]
    heads = ("model", "inductor ms", "memo ms", "ratio of pairs", "inductor MiB", "memo MiB")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [
        f"| {r['model']} | {r['inductor_seconds'] * 1000:.0f} | {r['memo_seconds'] * 1000:.0f} | {r['ratio']:.3f} "
        f"| {r['inductor_peak'] / MIB:.2f} | {r['memo_peak'] / MIB:.2f} |"
        for r in rows
    ]
    print("\n".join(lines))
    save("idle", "python -m bench.idle " + " ".join(sys.argv[1:]), rows, "\n".join(lines))


if __name__ == "__main__":
    main()
