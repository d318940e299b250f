"""Arena over lower bound, and what placement costs, for every model of the tests at every budget and for `memo plan`.

    python -m bench.arenas [--only PART] [--models NAME …]

Compilations stop after the dry runs, before any kernel is compiled: of a whole one placement is a smaller share still.
Processor seconds of one thread, which a busy machine does not change much; whatever the interpreter does meanwhile,
such as collecting garbage, counts. For `memo plan` placement is `place_layers` alone: simulating the plan to find
out when slices leave and land is counted with the rest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

from bench.common import save
from memo_compile.codegen import rehearsal
from memo_compile.codegen.planned_step import plan_step
from memo_compile.errors import BudgetTooSmall
from memo_compile.forecast import arena as offline_arena
from memo_compile.forecast import forecast
from memo_compile.forecast.forecast import Asked
from memo_compile.forecast.parallel import layout
from memo_compile.placement import kernel
from tests.helpers import zoo

BUDGETS: tuple[float | str, ...] = (1.0, 0.6, 0.4, "min")
BATCH = 3  # sequences, as the tests compile
PRESETS = {
    "gpt-7b": Asked("gpt-7b", 1 << 20, layout(8, 8, 1), "a800", host_memory=2 << 40),
    "llama-8b": Asked("llama-8b", 1 << 17, layout(8, 8, 1), "h100"),
}
Row = dict[str, Any]


@contextmanager
def timed(module: ModuleType, function: str) -> Iterator[list[float]]:
    """Within, the processor seconds of each call of a module's function are added to the list."""
    spent: list[float] = []
    whole = getattr(module, function)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = whole(*args, **kwargs)
        spent.append(time.process_time() - started)
        return result

    with mock.patch.object(module, function, call):
        yield spent


def compiled(name: str, budget: float | str) -> list[Row]:
    """One model at one budget, from dry runs of Inductor."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, x = zoo.make(name), zoo.batch(BATCH)
    with mode:
        x = mode.from_tensor(x)
    row: Row = {"model": name, "budget": str(budget)}
    started = time.process_time()
    with timed(rehearsal, "plan_arena") as spent:
        try:
            step = plan_step(mode, model, (x,), {"labels": x}, {"memory_budget": budget})
        except BudgetTooSmall:
            return [{**row, "budget": f"{budget}: refused"}]
    seconds = time.process_time() - started
    return [
        {
            **row,
            "arena": g.plan.arena_bytes,
            "lower bound": g.plan.lower_bound,
            "ratio": g.plan.arena_bytes / g.plan.lower_bound,
            "segments": len(g.plan.segments),
            "buffers": len(g.plan.buffers),
            "placed": len(spent),
            "placement s": sum(spent),
            "compile s": seconds,
            "share": sum(spent) / seconds,
        }
        for g in step.graphs
    ]


def planned(name: str) -> Row:
    """One preset as `memo plan` plans it."""
    started = time.process_time()
    with timed(offline_arena, "place_layers") as spent:
        found = forecast.forecast_preset(PRESETS[name])
    seconds = time.process_time() - started
    return {
        "model": name,
        "budget": f"memo plan, {found.asked.tokens:,} tokens",
        "arena": found.arena.bytes,
        "lower bound": found.arena.lower_bound,
        "ratio": found.arena.bytes / found.arena.lower_bound,
        "segments": 1,
        "buffers": found.arena.buffers,
        "placed": 1,
        "placement s": spent[0],
        "compile s": seconds,
        "share": spent[0] / seconds,
    }


def summary(rows: list[Row]) -> str:
    """The table, and the worst of it."""
    keys = list(dict.fromkeys(k for r in rows for k in r))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_text(k, r.get(k, "")) for k in keys) + " |" for r in rows]
    done = [r for r in rows if "ratio" in r]
    worst, share = max(r["ratio"] for r in done), max(r["share"] for r in done)
    lines += ["", f"At worst: arena {worst:.4f} × LB, placement {share:.1%} of what compiling takes before kernels."]
    lines += [
        "",
        "Of `memo plan`, placing alone is counted as placement; the simulation that gives the live ranges is not.",
    ]
    return "\n".join(lines)


def _text(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if key == "share" else f"{value:.4f}" if key == "ratio" else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Run the parts that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["compiled", "planned"])
    parser.add_argument("--models", nargs="*", default=list(zoo.MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kernel.load()  # compiled before anything is timed
    rows: list[Row] = []
    if "compiled" in arguments.only:
        compiled(arguments.models[0], "min")  # what is done once in a process
        for name in arguments.models:
            for budget in BUDGETS:
                rows += compiled(name, budget)
                print(rows[-1], flush=True)
    if "planned" in arguments.only:
        for name in PRESETS:
            rows.append(planned(name))
            print(rows[-1], flush=True)
    save("arenas", "python -m bench.arenas", rows, summary(rows))


if __name__ == "__main__":
    main()
