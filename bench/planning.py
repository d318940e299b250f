"""Planning seconds against the number of layers: all that `memo plan` does, the linear program, and finding layers.

    python -m bench.planning [--only layers|commands]

Processor seconds of one thread, which a busy machine does not change much. The program is that of gpt-7b at 1M tokens
on 8 A800s with as many layers; the graph is one of as many small Llama layers, forward only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bench.common import save
from bench.paper import K, case, stack_of
from memo_compile.forecast.forecast import Asked, Forecast, forecast_preset
from memo_compile.forecast.parallel import layout
from memo_compile.forecast.presets import PRESETS
from memo_compile.forecast.strategies import recomputing_only
from memo_compile.models import Llama, LlamaConfig
from memo_compile.passes.analysis.layers import annotate_layers
from memo_compile.planning.rounding import decide
from memo_compile.planning.simulate import simulate

# What a user types, timed from the start of the process.
COMMANDS = (
    "plan --preset gpt-7b --seq 1048576 --gpus 8 --tp 8 --hardware a800 --host-memory 2TiB",
    "plan --preset gpt-65b --seq 131072 --gpus 64 --tp 8 --hardware a800 --host-memory 2TiB",
    "plan --preset gpt-65b --seq 1048576 --gpus 64 --tp 8 --hardware a800 --host-memory 2TiB",
)
LAYERS = (8, 16, 32, 80, 120, 160)


def processor_seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time, and the result."""
    started = time.process_time()
    result = fn()
    return time.process_time() - started, result


def row_of(layers: int) -> dict[str, Any]:
    """One number of layers."""
    full = case("gpt-7b", K * K)
    # Host memory grows with the layers, so that each is as hard to place as in the 32-layer model.
    c = replace(full, preset=replace(full.preset, layers=layers), host=full.host * layers // 32)
    stack = stack_of(c)
    anchors = stack.anchors[0]
    problem = recomputing_only(stack, {a.name for a in stack.problem.activations if a.recompute_seconds} - anchors)
    program, decision = processor_seconds(lambda: decide(problem, time_limit=120))
    assert decision is not None
    simulation, played = processor_seconds(lambda: simulate(problem, decision.residency))
    model = Llama(LlamaConfig(vocab=64, layers=layers, width=32, heads=4, ffn=64))
    with torch.no_grad():
        graph = make_fx(lambda x: model(x, labels=x))(torch.zeros(1, 64, dtype=torch.int64))
    finding, report = processor_seconds(lambda: annotate_layers(graph))
    planning, forecast = processor_seconds(lambda: planned(layers))
    return {
        "layers": layers,
        "planning_seconds": planning,
        "planned_to_fit": forecast.fits,
        "activations": len(problem.activations),
        "program_seconds": program,
        "simulation_seconds": simulation,
        "nodes": len(graph.graph.nodes),
        "finding_seconds": finding,
        "layers_found": len(report.classes),
        "step_seconds": decision.seconds,
        "simulated_seconds": played.seconds,
    }


def planned(layers: int) -> Forecast:
    """`memo plan` of gpt-7b at 1M tokens on 8 A800s, with so many layers and the host memory to match."""
    deeper = {"gpt-7b": replace(PRESETS["gpt-7b"], layers=layers)}
    with patch.dict(PRESETS, deeper):
        asked = Asked("gpt-7b", K * K, layout(8, 8, 1), "a800", host_memory=2 * 2**40 * layers // 32)
        return forecast_preset(asked)


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds, and milliseconds a layer."""
    lines = [
        "| layers | planning s | activations | program s | ms a layer | simulation s | graph nodes | finding layers s "
        "| found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [str(r["layers"]), f"{r['planning_seconds']:.1f}", str(r["activations"])]
        cells += [f"{r['program_seconds']:.2f}"]
        cells += [f"{1e3 * r['program_seconds'] / r['layers']:.1f}", f"{r['simulation_seconds']:.2f}"]
        cells += [str(r["nodes"]), f"{r['finding_seconds']:.2f}", str(r["layers_found"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command_row(command: str) -> dict[str, Any]:
    """One `memo` command in a process of its own: seconds of the clock and of processors, MiB of memory at most."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "memo_compile", *command.split()], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "command": f"memo {command}",
        "fits": process.returncode == 0,
        "seconds": time.perf_counter() - started,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "memory_mib": used.ru_maxrss / 1024,
    }


def command_table(rows: list[dict[str, Any]]) -> str:
    """Seconds and memory of each command."""
    lines = ["| command | fits | processor s | clock s | MiB |", "|---|---|---|---|---|"]
    for r in rows:
        cells = [f"`{r['command']}`", "yes" if r["fits"] else "no", f"{r['processor_seconds']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{r['seconds']:.1f}", f"{r['memory_mib']:.0f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and save; with --only, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("layers", "commands"))
    only = parser.parse_args().only
    rows, commands = [], []
    if only != "layers":
        for command in COMMANDS:
            commands.append(command_row(command))
            print(commands[-1], flush=True)
    if only != "commands":
        processor_seconds(lambda: row_of(4))  # imports and caches
        for layers in LAYERS:
            rows.append(row_of(layers))
            print(rows[-1], flush=True)
    if only is None:
        save("planning", "python -m bench.planning", [*rows, *commands], f"{table(rows)}\n\n{command_table(commands)}")


if __name__ == "__main__":
    main()
