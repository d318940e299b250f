"""Plan training without a GPU: what a rank holds, where activations go, how long a step takes.

Either one of the models that memo knows by name (--preset), or a function, package.module:function, that returns
(model, args) or (model, args, kwargs). It is called with fake tensors. Options after these are for `memo check`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memo_compile.errors import InvalidOption
from memo_compile.forecast.parallel import Layout, layout
from memo_compile.hardware.profiles import PROFILES, resolve
from memo_compile.options import parse_bytes
from memo_compile.trace.targets import load_target, made_of_fakes

if TYPE_CHECKING:
    from memo_compile.forecast.forecast import Asked, Forecast, Say
    from memo_compile.forecast.rows import ResidencyRow
    from memo_compile.passes.analysis.costs import KernelTimer

WIDTH = 140  # columns where the output is no terminal
STRATEGY = (
    "memo; keep, offload or recompute: the homes that are open; keep-all, full-recompute, full-swap, input-swap, alpha "
    "(the paper's) or whole-tensors: what one could do instead"
)
CODE = 75  # columns of a source line and its code
HELP = "plan a training step for devices that need not be there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("target", nargs="?", metavar="package.module:function", help="what makes a model and its inputs")
    what.add_argument("--preset", help="gpt-7b, 13b, 30b, 65b; llama-1b, 3b, 8b, 70b")
    parser.add_argument("--seq", type=int, help="tokens of the sequence that a preset trains on")
    parser.add_argument("--gpus", type=int, default=1, help="devices in all (1)")
    parser.add_argument("--tp", type=int, default=1, help="devices that share one model and sequence (1)")
    parser.add_argument("--cp", type=int, default=1, help="devices that share the tokens of one sequence (1)")
    parser.add_argument("--zero", type=int, default=1, help="what data-parallel ranks share: stage 0 to 3 (1)")
    parser.add_argument("--hardware", default="auto", help="a100, a800, h100, h200, b200, cpu, or a profile's file")
    parser.add_argument(
        "--host-memory", metavar="BYTES", help='of one machine, for offloading: "2TiB" (the profile\'s)'
    )
    parser.add_argument(
        "--memory-budget", metavar="BYTES", help="for activations on a device (its memory less 5 %% and the model)"
    )
    parser.add_argument("--strategy", default="memo", help=STRATEGY)
    parser.add_argument("--trace-layers", type=int, default=4, help="layers of a preset to trace, 4 or more (4)")
    parser.add_argument(
        "--measure-kernels",
        action="store_true",
        help="time matmuls and attentions on this machine's device of that hardware, instead of estimating them",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print the table; 1 where nothing fits, and the table is of the plan that needs least."""
    from rich.console import Console  # loads rich

    from memo_compile.forecast.forecast import TRACED, Asked  # loads torch

    if arguments.json is not None and (not arguments.json.absolute().parent.is_dir() or arguments.json.is_dir()):
        raise InvalidOption("--json", str(arguments.json), "a file in a folder that exists")
    if arguments.trace_layers < TRACED:
        raise InvalidOption("--trace-layers", arguments.trace_layers, f"{TRACED} or more")
    if (arguments.seq is None) != (arguments.preset is None):
        raise InvalidOption("--seq", arguments.seq, "the number of tokens, with --preset and only with it")
    if arguments.preset is None and arguments.tp != 1:
        raise InvalidOption("--tp", arguments.tp, "1: only presets know how they are shared out")
    asked = Asked(
        name=arguments.preset or arguments.target,
        tokens=arguments.seq or 0,
        layout=layout(arguments.gpus, arguments.tp, arguments.zero, arguments.cp),
        hardware=arguments.hardware,
        host_memory=_size("--host-memory", arguments.host_memory),
        budget=_size("--memory-budget", arguments.memory_budget),
        strategy=arguments.strategy,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    with Console(stderr=True).status("planning") as status:
        found = _planned(asked, arguments, status.update)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    for part in _report(found):
        console.print(part)
    return 0 if found.fits else 1


def _size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    size = parse_bytes(text)
    if not size:
        raise InvalidOption(option, text, 'a size such as "48GiB" or "2TiB"')
    return size


def _planned(asked: Asked, arguments: argparse.Namespace, say: Say) -> Forecast:
    from torch._subclasses import FakeTensorMode  # loads torch

    from memo_compile.forecast.forecast import forecast_model, forecast_preset  # loads torch

    timer = _timer(asked.hardware) if arguments.measure_kernels else None
    if arguments.preset is not None:
        return forecast_preset(asked, traced=arguments.trace_layers, say=say, timer=timer)
    say(f"building {asked.name}")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, args, kwargs, _ = made_of_fakes(asked.name, load_target(asked.name), mode)
    return forecast_model(asked, model, args, kwargs, say=say, timer=timer)


def _timer(hardware: str) -> KernelTimer:
    import torch  # takes a second, and not every caller needs it

    from memo_compile.passes.analysis.costs import KernelTimer  # loads torch

    profile = resolve(hardware)
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise InvalidOption("--measure-kernels", profile.name, "hardware that is here: no CUDA device is")
    return KernelTimer(profile.device)


def _report(f: Forecast) -> list[Any]:
    parts = [_summary(f), _memory(f)]
    if f.residency:
        parts.append(_residency_table("Saved activations, by layer class", f.residency, f, sources=False))
    if f.tensors:
        parts.append(_residency_table(f"One of {f.tensors[0].layers} such layers", f.tensors, f, sources=True))
    parts.append(_largest(f))
    if quadratic := next((t for t in f.largest if t.quadratic), None):
        parts.append(_advice(quadratic))
    return parts


def _table(title: str, *columns: str) -> Any:
    from rich import box  # loads rich
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _summary(f: Forecast) -> Any:
    a = f.asked
    where = f"{a.layout.gpus} × {f.profile}, {_group(a.layout)}, ZeRO {a.layout.zero}"
    table = _table(f"{a.name}, {a.tokens:,} tokens, {where}", "", "")
    table.show_header = False
    if not f.fits:
        short = (f.peak - f.budget) / 2**30
        table.add_row("[bold red]does not fit[/]", f"[bold red]{short:,.1f} GiB short; this is the smallest plan[/]")
    rates = ", not calibrated: a built-in profile's rates" if f.profile in PROFILES else ""
    table.add_row("step", f"{f.step_seconds:.4g} s{rates}")
    table.add_row("of it recomputing", f"{f.recompute_seconds:.3g} s")
    table.add_row("of it waiting for transfers", f"{f.stall_seconds:.3g} s")
    table.add_row("MFU, attention counted causally", f"{f.mfu:.2%}")
    table.add_row("tokens/s, all devices", f"{f.tokens_per_second:,.0f}")
    if f.tiles > 1:
        table.add_row("widest regions", f"in {f.tiles} tiles")
    table.add_row("what binds", f.binding)
    for name, price in f.prices.items():
        if price:
            table.add_row(f"one more {'GiB' if 'memory' in name else 'GB/s'} of {name}", f"saves {price:.3g} s")
    arena = f.arena
    table.add_row("arena / lower bound", f"{arena.bytes / max(1, arena.lower_bound):.4f}, {arena.buffers:,} buffers")
    table.add_row("planned in", f"{f.planning_seconds:.1f} s")
    return table


def _group(where: Layout) -> str:
    return f"sequence parallel {where.cp}" if where.cp > 1 else f"tensor parallel {where.tp}"


def _memory(f: Forecast) -> Any:
    table = _table("Memory of one device", "", "GiB")
    for name, size in (
        ("parameters", f.state.parameters),
        ("gradients", f.state.gradients),
        ("optimizer", f.state.optimizer),
        ("gathered in passing", f.state.gathered),
        ("activations and transients, at most", f.peak),
        ("  the most transients alone", f.transients),
        ("  placed in one arena", f.arena.bytes),
        ("  budget for both", f.budget),
        ("in all, at most", f.state.total + f.peak),
        ("on the host, for one device", f.offloaded),
        ("  host budget", f.host_budget),
    ):
        if size:
            table.add_row(name, f"{size / 2**30:,.2f}")
    return table


def _residency_table(title: str, classes: tuple[ResidencyRow, ...], f: Forecast, *, sources: bool) -> Any:
    columns = ["", "GiB", "kept", "offloaded", "recomputed", *(["line"] if sources else [])]
    table = _table(title, *columns)
    if sources:
        table.columns[-1].justify = "left"
    for h in classes:
        count = h.layers if sources else 1
        shares = [f"{part / h.bytes:.0%}" for part in (h.kept, h.offloaded, h.recomputed)]
        table.add_row(h.label, f"{h.bytes / count / 2**30:,.2f}", *shares, *([_short(h.source)] if sources else []))
    return table


def _largest(f: Forecast) -> Any:
    table = _table("Largest values that reach memory", "op", "shape", "GiB", "line")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", True
    for t in f.largest:
        style = "bold red" if t.quadratic else ""
        table.add_row(t.op, str(t.shape), f"{t.bytes / 2**30:,.2f}", _code(t.source), style=style)
    return table


def _advice(t: Any) -> str:
    return (
        f"[bold red]{t.op} at {_short(t.source)} makes {t.bytes / 2**30:,.1f} GiB that grow with the square of the "
        "tokens.[/] It is an attention mask or a score for every pair of tokens. Have attention told that it is causal "
        "(is_causal=True) instead of being given a mask: leave out attention_mask where nothing is padded, and with "
        'Hugging Face set attn_implementation="sdpa" or "flex_attention".'
    )


def _short(source: str) -> str:
    """The last two parts of the path, and the line."""
    path, separator, rest = source.partition(":")
    return "/".join(Path(path).parts[-2:]) + separator + rest.partition(":")[0]


def _code(source: str) -> str:
    """The same, with the code, as far as it leaves room for the other columns."""
    text = f"{_short(source)}: {source.split(': ', 1)[-1]}"
    return text if len(text) <= CODE else text[: CODE - 1] + "…"
