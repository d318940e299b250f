"""Which budget? Plan a step for several of them, without running any, and see what each costs.

python examples/choose_budget.py --hardware h100
"""

from __future__ import annotations

import argparse

import torch

import memo_compile
from memo_compile.models import Llama, LlamaConfig

MIB = 2**20


def main(argv: list[str] | None = None) -> list[memo_compile.Plan]:
    """Print a row for each budget; returns the plans."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", default="h100", help="the device to plan for")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    a = parser.parse_args(argv)

    model = Llama(LlamaConfig(layers=a.layers, width=a.width, ffn=3 * a.width)).to(torch.bfloat16)
    tokens = torch.zeros(1, a.tokens, dtype=torch.long)

    plans = []
    print("budget      peak MiB  offloaded MiB  recomputed  step ms  what binds")
    for budget in (*a.budgets, "min"):
        options = {"memory_budget": budget, "hardware": a.hardware}
        plan = memo_compile.plan(model, (tokens,), {"labels": tokens}, options)
        plans.append(plan)
        # A share that cannot be kept gets the least that there is; a budget in bytes would be refused.
        over = "" if plan.budget is None or plan.predicted_peak <= plan.budget else " (the least there is)"
        print(
            f"{budget:<10}  {plan.predicted_peak / MIB:8,.1f}  {plan.offloaded_bytes / MIB:13,.1f}  "
            f"{plan.recomputed_flops_share:10.1%}  {1000 * plan.predicted_seconds:7.1f}  {plan.binding}{over}"
        )
    return plans


if __name__ == "__main__":
    main()
