"""Train a byte-level language model in eager, with Inductor and with memo, and compare them.

The text is the source of Python's standard library, which every machine has. All runs start from one seed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import memo_compile
from memo_compile.errors import BudgetTooSmall, InvalidOption, MemoError, memo_error
from memo_compile.logs import MIB
from memo_compile.options import Options

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from memo_compile.schema import Plan

HELP = "train a small model on real text under a budget, beside eager and Inductor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="training steps of each run (20)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (4)")
    parser.add_argument("--width", type=int, default=256, help="width of the model (256)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a sequence (1024)")
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=["0.5"],
        help='what memo may hold: shares of the peak that Inductor was measured at, sizes ("40MiB"), or "min" (0.5)',
    )
    parser.add_argument("--out", type=Path, default=Path("memo-demo"), help="folder for the dumps (memo-demo)")


@dataclass(frozen=True)
class Run:
    """What one way of training came to. Bytes and seconds."""

    name: str
    losses: list[float]
    peak: int
    compile_seconds: float
    step_seconds: float
    plan: Plan | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def run(arguments: argparse.Namespace) -> int:
    """Train and print the table; 1 where a budget cannot be kept, and the table is of the other runs."""
    import torch  # takes a second, and not every caller needs it
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    _check(arguments)
    dump = Path(str(Options.parse({"dump": str(arguments.out)}).dump))  # MEMO_DUMP wins here too
    earlier = _dumps(dump)
    logging.getLogger("torch").setLevel(logging.ERROR)
    console = Console()
    refused: dict[str, BudgetTooSmall] = {}
    data = _batches(arguments.steps, arguments.tokens, arguments.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runs = [
            _train("eager", arguments, data, progress, lambda model: model),
            _train("inductor", arguments, data, progress, partial(torch.compile, backend="inductor")),
        ]
        for text in arguments.budgets:
            budget = _budget(text, runs[1].peak)
            options = {"memory_budget": budget, "dump": str(dump)}
            wrap = partial(torch.compile, backend="memo", options=options)
            try:
                runs.append(_train(f"memo, {text}", arguments, data, progress, wrap))
            except Exception as error:
                refusal = memo_error(error)
                if not isinstance(refusal, BudgetTooSmall):
                    raise
                refused[text] = refusal
    console.print(_table(runs))
    if made := sorted(_dumps(dump) - earlier):
        console.print(f"Graphs, plans and emitted code are in {', '.join(map(str, made))}", soft_wrap=True)
    for text, refusal in refused.items():
        print(f"memo demo: --budgets {text}: {refusal}", file=sys.stderr)
    return 1 if refused else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse at once what would fail only after something has been trained."""
    import torch  # takes a second, and not every caller needs it

    from memo_compile.models import LlamaConfig  # loads torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InvalidOption("--device", "cuda", "cpu: torch sees no CUDA device here")
    for name, least in (("steps", 1), ("layers", 1), ("tokens", 2)):  # one token predicts no other
        if getattr(arguments, name) < least:
            raise InvalidOption(f"--{name}", getattr(arguments, name), f"{least} or more")
    heads = LlamaConfig.heads
    if arguments.width < 1 or arguments.width % (2 * heads):
        allowed = f"a multiple of {2 * heads}: {heads} heads, whose features are rotated in pairs"
        raise InvalidOption("--width", arguments.width, allowed)
    Options.parse(None)  # the environment's mistakes, under their own names
    for text in arguments.budgets:  # whatever the peak that shares are of
        _check_option("--budgets", "memory_budget", _budget(text, 1 << 40))
    _check_option("--out", "dump", str(arguments.out))


def _check_option(flag: str, key: str, value: int | str) -> None:
    try:
        Options.parse({key: value})
    except InvalidOption as error:
        raise MemoError(f"{flag}: {error}") from error


def _dumps(folder: Path) -> set[Path]:
    """The folders of whole dumps in it, those of earlier runs included."""
    return {path.parent for path in folder.glob("*/plan.json")}


def _budget(text: str, inductor_peak: int) -> int | str:
    """A share of Inductor's measured peak becomes bytes; other values are the backend's to read."""
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 < share <= 1:
        raise InvalidOption("--budgets", text, 'shares in (0, 1], sizes such as "40MiB", or "min"')
    return max(1, int(share * inductor_peak))


def _batches(steps: int, tokens: int, device: str) -> list[torch.Tensor]:
    """One sequence of bytes for each step."""
    import torch  # takes a second, and not every caller needs it

    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= steps * tokens:
            break
    else:
        raise MemoError(f"the standard library's source has only {len(text)} bytes: fewer steps or tokens, please")
    whole = torch.frombuffer(bytearray(text[: steps * tokens]), dtype=torch.uint8).long()
    return [row.unsqueeze(0).to(device) for row in whole.view(steps, tokens)]


def _train(
    name: str,
    arguments: argparse.Namespace,
    data: list[torch.Tensor],
    progress: Progress,
    wrap: Callable[[Any], Any],
) -> Run:
    import torch  # takes a second, and not every caller needs it

    from memo_compile.models import Llama, LlamaConfig  # loads torch

    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(vocab=256, layers=arguments.layers, width=arguments.width)
    model = Llama(config).to(arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fn = wrap(model)
    task = progress.add_task(f"{name}: compiling", total=len(data))
    plans_before = len(memo_compile.plans())
    losses: list[float] = []
    seconds: list[float] = []
    for x in data:
        started = time.perf_counter()
        loss = fn(x, labels=x)
        loss.backward()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(task, advance=1, description=f"{name}: training")
    del loss
    peak = memo_compile.measure_peak(lambda: fn(data[0], labels=data[0]).backward())
    steady = statistics.median(seconds[1:]) if len(seconds) > 1 else seconds[0]
    made = memo_compile.plans()[plans_before:]
    return Run(
        name=name,
        losses=losses,
        peak=peak,
        compile_seconds=max(0.0, seconds[0] - steady),
        step_seconds=steady,
        plan=made[-1] if made else None,
    )


def _table(runs: list[Run]) -> Any:
    from rich.table import Table  # loads rich

    table = Table(title="One model, one seed, one text")
    table.add_column("")
    for r in runs:
        table.add_column(r.name, justify="right")
    reference = runs[1].losses

    def row(label: str, cell: Callable[[Run], str]) -> None:
        table.add_row(label, *(cell(r) for r in runs))

    def planned(cell: Callable[[Plan], str]) -> Callable[[Run], str]:
        return lambda r: cell(r.plan) if r.plan is not None else ""

    row("last loss", lambda r: f"{r.losses[-1]:.6f}")
    row(
        "largest difference from inductor",
        lambda r: f"{max(abs(a - b) for a, b in zip(r.losses, reference, strict=True)):.1e}",
    )
    row("budget, MiB", planned(lambda p: f"{p.budget / MIB:.1f}" if p.budget else ""))
    row("peak measured, MiB", lambda r: f"{r.peak / MIB:.1f}")
    row("peak planned, MiB", planned(lambda p: f"{p.predicted_peak / MIB:.1f}"))
    row("offloaded, MiB", planned(lambda p: f"{p.offloaded_bytes / MIB:.1f}"))
    row("forward FLOPs recomputed", planned(lambda p: f"{p.recomputed_flops_share:.1%}"))
    row("arena, MiB", planned(lambda p: f"{p.arena_bytes / MIB:.1f}"))
    row("arena / lower bound", planned(lambda p: f"{p.arena_bytes / p.lower_bound:.4f}" if p.lower_bound else ""))
    row("coverage", planned(lambda p: f"{p.coverage:.2f}"))
    row("compile, s", lambda r: f"{r.compile_seconds:.1f}")
    row("step, ms", lambda r: f"{r.step_seconds * 1000:.0f}")
    return table
