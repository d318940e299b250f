"""Are budgets kept? Measured against asked and predicted, beside eager, checkpointing and Inductor, in one run.

    python -m bench.budgets [--models llama gpt …] [--layers 8] [--tokens 2048]

Caches are off, so that every compilation is cold. Peaks are measured at the allocator over one step. The rows of a
model are made in one run; models that are not named keep the rows that they have.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import memo_compile
from bench.common import MODELS, RESULTS, checkpointed, make, measured, save
from memo_compile.logs import MIB

ASKED: list[dict[str, Any]] = [
    {},
    {"memory_budget": 1.0},
    {"memory_budget": 0.8},
    {"memory_budget": 0.6},
    {"memory_budget": 0.4},
    {"memory_budget": "min"},
    {"memory_budget": "min", "offload": False},
]


def baseline(name: str, how: str, layers: int, tokens: int) -> dict[str, Any]:
    """One row of what a user has without memo."""
    torch._dynamo.reset()
    model, x = make(name, layers, tokens)
    if how == "checkpointed":
        model = checkpointed(model)
    fn = torch.compile(model, backend="inductor") if how == "inductor" else model
    return {"model": name, "how": how, **measured(model, fn, x)}


def planned(name: str, options: dict[str, Any], layers: int, tokens: int) -> dict[str, Any]:
    """One row of memo."""
    torch._dynamo.reset()
    memo_compile.reset()
    model, x = make(name, layers, tokens)
    how = "memo " + (", ".join(f"{k}={v}" for k, v in options.items()) or "no budget")
    try:
        row = measured(model, torch.compile(model, backend="memo", options=options), x)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        refusal = error.inner_exception
        if not isinstance(refusal, memo_compile.BudgetTooSmall):
            raise
        return {"model": name, "how": how, "budget": refusal.budget, "refused_least": refusal.least}
    plans = memo_compile.plans()
    (plan,) = plans
    return {
        "model": name,
        "how": how,
        **row,
        "budget": plan.budget,
        "predicted": plan.predicted_peak,
        "offloaded": plan.offloaded_bytes,
        "recomputed_share": plan.recomputed_flops_share,
        "arena_over_lb": plan.arena_bytes / plan.lower_bound,
        "coverage": plan.coverage,
        "rounds": plan.rounds,
        "host_bytes": plan.host_bytes,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | | budget MiB | measured MiB | predicted | kept | offloaded MiB | recomputed | arena/LB | coverage "
        "| rounds | first step s | step ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        budget = f"{r['budget'] / MIB:.1f}" if r.get("budget") else ""
        if "refused_least" in r:
            lines.append(
                f"| {r['model']} | {r['how']} | {budget} | refused, least {r['refused_least'] / MIB:.1f} "
                "| | | | | | | | | |"
            )
            continue
        cells = [r["model"], r["how"], budget, f"{r['peak'] / MIB:.1f}"]
        if "predicted" in r:
            cells += [
                f"{r['predicted'] / r['peak'] - 1:+.2%}",
                "" if not r["budget"] else "yes" if r["peak"] <= r["budget"] else "NO",
                f"{r['offloaded'] / MIB:.1f}",
                f"{r['recomputed_share']:.0%}",
                f"{r['arena_over_lb']:.4f}",
                f"{r['coverage']:.2f}",
                str(r["rounds"]),
            ]
        else:
            cells += [""] * 7
        cells += [f"{r['first_step_seconds']:.1f}", f"{r['step_seconds'] * 1000:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def earlier(name: str) -> list[dict[str, Any]]:
    """The rows of the results that are there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def main() -> None:
    """Run and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--name", default="budgets")
    arguments = parser.parse_args()
    import torch._inductor.config as inductor_config

    inductor_config.force_disable_caches = True
    rows = [r for r in earlier(arguments.name) if r["model"] not in arguments.models]
    for name in arguments.models:
        for how in ("eager", "checkpointed", "inductor"):
            rows.append(baseline(name, how, arguments.layers, arguments.tokens))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        for options in ASKED:
            rows.append(planned(name, options, arguments.layers, arguments.tokens))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        rows.sort(key=lambda r: list(MODELS).index(r["model"]))
        save(arguments.name, "python -m bench.budgets", rows, table(rows))


if __name__ == "__main__":
    main()
