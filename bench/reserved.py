"""Would segments that are kept between steps make torch's allocator reserve less? Its rules, played without a device.

    python -m bench.reserved [--lengths 64 128] [--layers 4]

A wide Llama is planned on the H200's profile within the budgets of its rows (`bench/results/gpu.md`), and the lives of
the segments and of what lies outside of them are played over three steps, by the rules of
`memo_compile.hardware.caching_allocator`:

* heap: as it is, each segment taken when it begins and given back when it ends
* by size: a segment's block stays, and serves a segment of the same size
* where it fits: a block stays, and serves any segment that is no larger

"over" is with parameters and optimizer state beside, as in the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

from bench.common import save
from bench.models import MODELS
from memo_compile.codegen import compiler, planned_step
from memo_compile.codegen.arena.layout import ArenaLayout
from memo_compile.hardware.caching_allocator import Life, reserved
from memo_compile.hardware.device_memory import Allocator
from memo_compile.trace import setting

GIB, K = 2**30, 1024
STEPS = 3
BUDGETS = {64: (19.551, None), 128: (34.385, None)}  # GiB, of checkpoint+streams' rows; None for "min"
STATES = 3  # parameters, and two of AdamW's for each


def layout_of(tokens: int, layers: int, gib: float | None, allocator: Allocator) -> tuple[ArenaLayout, int]:
    """The layout of a plan within a budget, and the bytes of parameters and state."""
    found: list[Any] = []
    look = planned_step.look
    budget = None if gib is None else int(gib * GIB)

    def keep(*args: Any, **named: Any) -> Any:
        found.append(look(*args, **named))
        return found[-1]

    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode() as mode:
        model = MODELS["llama-8b"](layers, tokens, False)
        x = torch.zeros(1, tokens, dtype=torch.int64)
    torch.set_default_dtype(torch.float32)
    options = {"memory_budget": budget or "min", "hardware": "h200", "host_budget": "120GiB"}
    given = setting.Given(budget, allocator=allocator)

    def on_the_device(*args: Any) -> setting.Setting:
        return replace(setting.setting_for(*args), given=given)

    with mock.patch.object(planned_step, "look", keep), mock.patch.object(compiler, "setting_for", on_the_device):
        planned_step.plan_step(mode, model, (x, x), {}, options)
    held = STATES * sum(p.numel() * p.itemsize for p in model.parameters())
    (looked,) = [one for one in found if one is not None]
    return looked.layout, held


def kept(lives: Sequence[Life], *, any_size: bool) -> int:
    """Bytes of blocks that stay for good once they were taken, after some steps."""
    free: list[int] = []
    taken = 0
    for _ in range(STEPS):
        serves: dict[int, int] = {}
        for birth, number in _events(lives):
            if not birth:
                free.append(serves.pop(number))
                continue
            size = lives[number][2]
            fitting = [block for block in free if block == size or (any_size and block > size)]
            if fitting:
                free.remove(min(fitting))
            else:
                taken += size
            serves[number] = min(fitting, default=size)
    return taken


def _events(lives: Sequence[Life]) -> Iterator[tuple[bool, int]]:
    """Births and deaths in order; of one step deaths first."""
    ends = [(end, False, i) for i, (_, end, _) in enumerate(lives)]
    starts = [(start, True, i) for i, (start, _, _) in enumerate(lives)]
    yield from ((birth, number) for _, birth, number in sorted(ends + starts))


def row(tokens: int, layers: int, gib: float | None, allocator: Allocator) -> dict[str, Any]:
    """What is reserved for one plan, each way."""
    layout, held = layout_of(tokens * K, layers, gib, allocator)
    segments = [(s.start, s.end, s.size) for s in layout.segments]
    outside = reserved(layout.lives, expandable=allocator is Allocator.EXPANDABLE, rounds=STEPS)
    return {
        "tokens": tokens * K,
        "budget": "min" if gib is None else f"{gib:.1f} GiB",
        "allocator": str(allocator),
        "segments": len(segments),
        "sizes": len({size for *_, size in segments}),
        "state": held,
        "peak": layout.peak,
        "heap": layout.reserved(allocator),
        "by size": kept(segments, any_size=False) + outside,
        "where it fits": kept(segments, any_size=True) + outside,
    }


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """GiB, and what is reserved over what is allocated."""
    ways = ("heap", "by size", "where it fits")
    heads = ["tokens", "budget", "allocator", "segments", "of sizes", "planned peak GiB", *ways]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in rows:
        start = [f"{r['tokens'] // K}K", r["budget"], r["allocator"], str(r["segments"]), str(r["sizes"])]
        over = [f"{r[way] / GIB:.1f}, {(r[way] + r['state']) / (r['peak'] + r['state']):.2f} over" for way in ways]
        lines.append("| " + " | ".join([*start, f"{r['peak'] / GIB:.1f}", *over]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plan, play, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(BUDGETS), choices=list(BUDGETS), help="K tokens")
    parser.add_argument("--layers", type=int, default=4)
    a = parser.parse_args()
    rows = []
    for tokens in a.lengths:
        for gib in BUDGETS[tokens]:
            for allocator in (Allocator.EXPANDABLE, Allocator.SEGMENTS):
                rows.append(row(tokens, a.layers, gib, allocator))
                print(rows[-1], flush=True)
    save("reserved", " ".join(["python -m bench.reserved", *sys.argv[1:]]), rows, table_of(rows))


if __name__ == "__main__":
    main()
