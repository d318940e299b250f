"""Placement against what others reach, and its time against the number of buffers.

    python -m bench.placement [--data FOLDER] [--only PART] [--seconds S]

The instances are read from `../shared/data/dsa` beside the checkout. Figures of others are from its README.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import save
from bench.instances import crowded, layered, meeting, rectangles, tiles, training_like, wheels
from memo_compile.placement import Buffer, Placement, kernel, mip, place, place_layers, read_csv
from memo_compile.placement.core import Core, core_of
from memo_compile.placement.deadline import Deadline
from memo_compile.placement.greedy import ORDERS, first_fit, order_by

DATA = Path(__file__).parents[2] / "shared/data/dsa"
CAPACITY = 1_048_576
WITHIN = 30.0  # seconds for a graph of a model, from the call to the answer
# name: best of 16 greedy orders, TVM's hill climb (both as peak / LB), MiniMalloc's seconds to fit in the capacity
OTHERS: dict[str, tuple[float | None, float | None, float | None]] = {
    "minimalloc-A": (1.29, 1.18, 9.2),
    "minimalloc-C": (1.36, 1.18, 0.9),
    "minimalloc-F": (1.12, 1.19, 11.8),
    "minimalloc-I": (1.39, 1.24, 5.9),
    "minimalloc-K": (1.28, 1.23, 0.9),
    "resnet50": (1.003, None, None),
    "iopddl-G1": (1.0, None, None),
    "pangu-2.6B": (1.033, None, None),
}
Row = dict[str, Any]


def row(part: str, name: str, buffers: int, answer: Placement, **more: Any) -> Row:
    """One line of the results."""
    return {
        "part": part,
        "name": name,
        "buffers": buffers,
        "peak": answer.peak,
        "ratio": answer.peak / max(1, answer.lower_bound),
        "proved": answer.proved_optimal,
        "fits": answer.fits,
        "solver": answer.solver,
        "seconds": answer.seconds,
        **more,
    }


def instances(data: Path, seconds: float) -> list[Row]:
    """The given instances: those of MiniMalloc with its capacity and without, the others without."""
    rows = []
    for name, (greedy, climb, minimalloc) in OTHERS.items():
        buffers = read_csv(data / f"{name}.csv")
        others = {"greedy": greedy, "hill climb": climb, "minimalloc seconds": minimalloc}
        if minimalloc is not None:
            answer = place(buffers, capacity=CAPACITY, time_limit=seconds)
            rows.append(row("capacity", name, len(buffers), answer, **others))
            print(rows[-1], flush=True)
        answer = place(buffers, time_limit=seconds if minimalloc is not None else min(WITHIN - 1, seconds))
        rows.append(row("least peak", name, len(buffers), answer, **others))
        print(rows[-1], flush=True)
    return rows


def packable() -> list[Row]:
    """Perfectly packable rectangles, ten seeds each: cut at random, all alike, and such as no straight cut divides."""
    rows = []
    for cut in (rectangles, tiles, wheels):
        for count in (25, 50, 100, 200):
            for steps, height in ((1000, 1000), (100_000, 100_000), (100, 2**20), (100, 1000), (30, 2**20), (30, 1000)):
                answers = [place(cut(count, seed, steps, height), time_limit=10) for seed in range(10)]
                name = f"{cut.__name__}, {steps} steps, height {height}"
                worst = max(answers, key=lambda a: a.seconds)
                solved = sum(a.proved_optimal for a in answers)
                rows.append(row("packable", name, count, worst, solved=f"{solved} of {len(answers)}"))
                print(rows[-1], flush=True)
    return rows


def scaling() -> list[Row]:
    """Time and memory against the number of buffers, each in a process of its own."""
    rows = []
    for count in (100, 1_000, 5_000, 10_000, 20_000, 50_000):
        code = f"from bench.placement import one_scale; one_scale({count})"
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        ratio, seconds, verified, mebibytes, solver = out.strip().split("|")
        rows.append(
            {
                "part": "scaling",
                "name": "training-like",
                "buffers": count,
                "ratio": float(ratio),
                "seconds": float(seconds),
                "verifier seconds": float(verified),
                "MiB": float(mebibytes),
                "solver": solver,
            }
        )
        print(rows[-1], flush=True)
    return rows


def one_scale(count: int) -> None:
    """Place once and print figures, for `scaling`."""
    from memo_compile.placement import verify

    buffers = training_like(count)
    answer = place(buffers, time_limit=30)
    started = time.perf_counter()
    verify(buffers, answer)
    verified = time.perf_counter() - started
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{answer.peak / answer.lower_bound}|{answer.seconds}|{verified}|{mebibytes}|{answer.solver}")


def greedy_start(core: Core) -> tuple[Any, int]:
    """The best of the greedy orders."""
    results = [first_fit(core, order_by(core, keys)) for keys in ORDERS.values()]
    return min((r for r in results if r is not None), key=lambda r: r[1])


def above_the_bound(count: int, wanted: int) -> Iterator[tuple[list[Buffer], Core, Any, int]]:
    """Crowded problems on which the best of all greedy orders is above LB: buffers, core, greedy's offsets and peak."""
    for seed in itertools.count():
        buffers = crowded(count, seed)
        core = core_of(buffers, 1, {})
        known, peak = greedy_start(core)
        if 0.4 <= meeting(buffers) <= 0.75 and peak > core.lower_bound():
            yield buffers, core, known, peak
            wanted -= 1
            if not wanted:
                return


def programs(count: int, wanted: int, seconds: float, tricks: dict[str, mip.Tricks]) -> list[Row]:
    """HiGHS alone on crowded problems, with all tricks and with each of them left out."""
    problems = list(above_the_bound(count, wanted))
    rows = []
    for name, kind in tricks.items():
        proved, times, ratios, better = 0, [], [], 0
        for _, core, known, peak in problems:
            bound = core.lower_bound()
            started = time.process_time()
            answer = mip.solve(core, known, bound, Deadline(seconds), kind)
            times.append(time.process_time() - started)
            best = peak if answer.offsets is None else int((answer.offsets + core.size).max())
            proved += best <= answer.least
            better += best < peak
            ratios.append(best / bound)
        rows.append(
            {
                "part": "HiGHS",
                "name": name,
                "buffers": count,
                "ratio": float(np.mean(ratios)),
                "processor seconds": max(times),
                "mean": float(np.mean(times)),
                "proved": f"{proved} of {len(problems)}",
                "improved": f"{better} of {len(problems)}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def highs() -> list[Row]:
    """25 buffers with each trick left out, 50 with all."""
    everything = mip.Tricks()
    without = {
        "all tricks": everything,
        "without live sets": mip.Tricks(live_sets=False),
        "without symmetry": mip.Tricks(symmetry=False),
        "without warm start": mip.Tricks(warm_start=False),
        "without asking for LB first": mip.Tricks(bound_first=False),
        "none": mip.Tricks(live_sets=False, symmetry=False, warm_start=False, bound_first=False),
    }
    return programs(25, 20, 5.0, without) + programs(50, 5, 20.0, {"all tricks": everything})


def layers() -> list[Row]:
    """Two levels against flat, for 8 to 160 layers."""
    rows = []
    for count in (8, 32, 80, 160):
        buffers, layer_of = layered(count)
        flat = place(buffers, time_limit=30)
        two = place_layers(buffers, layer_of, time_limit=30)
        rows.append(row("layers", f"{count} layers", len(buffers), two, **{"flat ratio": flat.peak / flat.lower_bound}))
        rows[-1]["flat seconds"] = flat.seconds
        print(rows[-1], flush=True)
    return rows


def summary(rows: list[Row]) -> str:
    """The tables."""
    lines = []
    for part in dict.fromkeys(r["part"] for r in rows):
        mine = [r for r in rows if r["part"] == part]
        keys = [k for k in dict.fromkeys(k for r in mine for k in r) if k != "part"]
        lines += ["", f"## {part}", "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(_text(r.get(k)) for k in keys) + " |" for r in mine]
        if part == "least peak":
            ratios = [r["ratio"] for r in mine if r["name"].startswith("minimalloc")]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines += ["", f"minimalloc: geometric mean {mean:.4f} × LB, worst {max(ratios):.4f}"]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if value < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


def main() -> None:
    """Run the parts that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", nargs="*", default=["instances", "packable", "scaling", "highs", "layers"])
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    kernel.load()  # compiled before anything is timed
    parts: dict[str, Callable[[], list[Row]]] = {
        "instances": lambda: instances(arguments.data, arguments.seconds),
        "packable": packable,
        "scaling": scaling,
        "highs": highs,
        "layers": layers,
    }
    rows = [r for part in arguments.only for r in parts[part]()]
    save("placement", "python -m bench.placement", rows, summary(rows))


if __name__ == "__main__":
    main()
