"""The paper's table: GPTs on A800s at 64K to 1408K tokens, by strategy, simulated.

    python -m bench.paper [--models gpt-7b ...] [--lengths 65536 ...]

A layer is written down by formula, as MEMO (arXiv 2407.12117, section 3) counts it: of s tokens of width h, 16 s·h
elements are saved, in bfloat16, divided among 8 tensor-parallel ranks with sequence parallelism. `ASSUMPTIONS` says
what else goes into the figures.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

from bench.common import save
from memo_compile.forecast.presets import PRESETS, Preset
from memo_compile.forecast.strategies import STRATEGIES, Outcome, Stack, outcomes
from memo_compile.hardware.efficiency import share_at
from memo_compile.hardware.profiles import PROFILES, DeviceProfile
from memo_compile.planning.residency import Activation, Problem

K = 1024
TP = 8
GPUS = {"gpt-7b": 8, "gpt-13b": 16, "gpt-30b": 32, "gpt-65b": 64}
LENGTHS = tuple(n * K for n in (64, 128, 192, 256, 512, 768, 1024, 1280, 1408))
HOST_OF_A_MACHINE = 2 * 10**12
MARGIN = 0.05  # of the device's memory
SLICES = 64
CHUNKS = 16  # of the loss
BACKWARD_OF_ATTENTION = 2.5  # FLOPs, of the forward's: flash attention makes the scores again
PAPER_MFU_7B_1M = 0.523

ASSUMPTIONS = (
    "A800 as in the built-in profile: 312 TFLOP/s, efficiencies of matmuls 0.859, of attention 0.70 forward and 0.60 "
    "backward, 12.5 GB/s to and from the host for each GPU, 200 GB/s from the peers of a machine at 0.8",
    "tensor parallelism 8 with sequence parallelism; machines divide the sequence (context parallelism), and their "
    "exchange of keys and values hides behind attention",
    "optimizer state divided over the context-parallel ranks (ZeRO 1), bfloat16 parameters and gradients",
    "2 TB of host memory for each machine of 8; 5 % of the device's memory left alone",
    "saved activations of 7B at 1M tokens: 32 layers x 16 units x 1M tokens x 4096 x 2 bytes = 4096 GiB, as in the "
    "paper; one unit of every layer, its input, is then 4096 / 16 = 256 GiB. The paper's 128 GiB of layer inputs does "
    "not go with that (128 GiB is what one layer saves in all): 256 GiB stands here",
    "whole tensors: the linear program's answer dealt out to whole tensors, and no integer program. The linear answer "
    "is a bound on every integer one, so that the column is at most its distance to memo's from the integer optimum",
    "the loss in 16 chunks; attention counted causally; MFU of 3 x the forward's FLOPs, nothing recomputed",
)

# Forward steps of a layer, and what they save: (name, units of s·h elements).
STEPS = ("norm1", "qkv", "attention", "out", "norm2", "wide", "gelu", "narrow")
# name: (units, made by step, last read by step, gradient reads at step, made from, share of its step's seconds)
SAVED: dict[str, tuple[int, str, str, str, tuple[str, ...], float]] = {
    "norm1": (1, "norm1", "qkv", "qkv", ("input",), 1.0),
    "q": (1, "qkv", "attention", "attention", ("norm1",), 1 / 3),
    "k": (1, "qkv", "attention", "attention", ("norm1",), 1 / 3),
    "v": (1, "qkv", "attention", "attention", ("norm1",), 1 / 3),
    "attention": (1, "attention", "out", "out", ("q", "k", "v"), 1.0),
    "residual": (1, "out", "narrow", "norm2", ("attention", "input"), 1.0),
    "norm2": (1, "norm2", "wide", "wide", ("residual",), 1.0),
    "wide": (4, "wide", "gelu", "gelu", ("norm2",), 1.0),
    "gelu": (4, "gelu", "narrow", "narrow", ("wide",), 1.0),
}
UNITS = 1 + sum(s[0] for s in SAVED.values())
# What a step holds beside saved activations, in units: gathered sequences are TP units.
TRANSIENT = {"qkv": TP, "out": TP, "wide": TP, "narrow": TP}
TRANSIENT_BACK = {
    "narrow": TP + 4 + 1,
    "gelu": 4 + 4 + 1,
    "wide": 2 * TP + 4 + 1,
    "norm2": 3,
    "out": TP + 2,
    "attention": 5,
    "qkv": 2 * TP + 3 + 1,
    "norm1": 3,
}


@dataclass(frozen=True)
class Case:
    """One rank of one cell of the table. `unit` is s·h elements of bfloat16 on one rank, in bytes."""

    preset: Preset
    gpus: int
    tokens: int
    profile: DeviceProfile
    budget: int
    host: int

    @property
    def rows(self) -> float:
        """Tokens of one tensor-parallel group."""
        return self.tokens * TP / self.gpus

    @property
    def unit(self) -> int:
        """Bytes of one s·h activation on one rank."""
        return int(2 * self.rows * self.preset.width / TP)


def case(
    name: str, tokens: int, *, gpus: int | None = None, hardware: str = "a800-80gb", rate: float | None = None
) -> Case:
    """One cell: the model's share of the device's and of the host's memory."""
    preset, profile, gpus = PRESETS[name], PROFILES[hardware], gpus or GPUS[name]
    if rate is not None:
        profile = replace(profile, d2h=rate, h2d=rate)
    # Parameters, gradients, and Adam's state with a float32 copy, which the context-parallel ranks share.
    state = preset.parameters / TP * (2 + 2 + 12 / (gpus / TP))
    budget = int(profile.memory * (1 - MARGIN) - state)
    return Case(preset, gpus, tokens, profile, budget, HOST_OF_A_MACHINE // TP)


def flops_of(c: Case) -> dict[str, float]:
    """FLOPs of each forward step of a layer on one rank."""
    h, rows = c.preset.width, c.rows
    matmul = 2.0 * rows * h * h / TP
    return {
        "qkv": 3 * matmul,
        "attention": 2.0 * rows * c.tokens * h / TP,  # two matmuls of 2·s·S·h, halved: causal
        "out": matmul,
        "wide": 4 * matmul,
        "narrow": 4 * matmul,
    }


def seconds_of(c: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each step of a layer, forward and backward."""
    p, flops = c.profile, flops_of(c)
    peak = p.flops("bfloat16")
    gather = c.unit * (TP - 1) / (p.link * p.link_efficiency)
    memory = c.unit / (p.memory_bandwidth * p.memory_efficiency)
    forward, backward = {}, {}
    for step in STEPS:
        if step in ("norm1", "norm2"):
            forward[step], backward[step] = 2 * memory, 4 * memory
        elif step == "gelu":
            forward[step], backward[step] = 8 * memory, 12 * memory
        elif step == "attention":
            back = BACKWARD_OF_ATTENTION * flops[step]
            forward[step] = flops[step] / (peak * share_at(p.attention_efficiency, flops[step]))
            backward[step] = back / (peak * share_at(p.attention_backward_efficiency, back))
        else:
            matmul = flops[step] / (peak * share_at(p.matmul_efficiency, flops[step]))
            # Each matmul gathers or scatters once forward; backward it also gathers its saved operand again.
            twice = 2 if step in ("qkv", "wide") else 1
            forward[step], backward[step] = matmul + gather, 2 * matmul + twice * gather
    return forward, backward


def head_seconds(c: Case) -> float:
    """Seconds of the classifier and its gradients, chunk by chunk, at the start of the backward."""
    flops = 2.0 * c.rows * c.preset.width * c.preset.vocab / TP
    return 3 * flops / (c.profile.flops("bfloat16") * share_at(c.profile.matmul_efficiency, flops / CHUNKS))


def model_flops(c: Case) -> float:
    """Of one step on one rank: three times the forward's."""
    head = 2.0 * c.rows * c.preset.width * c.preset.vocab / TP
    return 3 * (c.preset.layers * sum(flops_of(c).values()) + head)


def stack_of(c: Case) -> Stack:
    """The training step of one rank as a program: layers by formula, the chunked loss between the two passes."""
    n, per = c.preset.layers, len(STEPS)
    forward, backward = seconds_of(c)
    steps = n * per
    seconds = [forward[s] for _ in range(n) for s in STEPS] + [head_seconds(c)]
    seconds += [backward[s] for _ in range(n) for s in reversed(STEPS)]
    head = 2 * c.unit + int(c.rows / CHUNKS * c.preset.vocab / TP * (2 + 4))
    base = [TRANSIENT.get(s, 0) * c.unit for _ in range(n) for s in STEPS] + [head]
    base += [TRANSIENT_BACK[s] * c.unit for _ in range(n) for s in reversed(STEPS)]
    place = {s: i for i, s in enumerate(STEPS)}

    def back(layer: int, step: str) -> int:
        return steps + 1 + (n - 1 - layer) * per + (per - 1 - place[step])

    activations, needs, layer_of = [], {}, {}
    for layer in range(n):
        first = layer * per
        name = f"{layer}.input"
        made = max(first - 1, 0)  # by the last step of the layer before; the first by the embedding
        recompute = forward["narrow"] if layer else None
        read = back(layer, "norm1")
        activations.append(
            Activation(
                name=name,
                bytes=c.unit,
                tokens=SLICES,
                produced=made,
                last_forward=first + place["out"],
                first_backward=read,
                last_backward=read,
                recompute_seconds=recompute,
            )
        )
        needs[name] = (f"{layer - 1}.gelu", f"{layer - 1}.residual") if layer else ()
        layer_of[name] = layer
        for saved, (units, by, last, grad, sources, share) in SAVED.items():
            name = f"{layer}.{saved}"
            read = back(layer, grad)
            # Flash attention's backward reads its output after the projection's did.
            dead = back(layer, "attention") if saved == "attention" else read
            activations.append(
                Activation(
                    name=name,
                    bytes=units * c.unit,
                    tokens=SLICES,
                    produced=first + place[by],
                    last_forward=first + place[last],
                    first_backward=read,
                    last_backward=dead,
                    recompute_seconds=forward[by] * share,
                    recompute_whole=saved == "attention",
                )
            )
            needs[name] = tuple(f"{layer}.{source}" for source in sources)
            layer_of[name] = layer
    problem = Problem(
        tuple(seconds), tuple(base), steps, tuple(activations), c.budget, c.host, c.profile.d2h, c.profile.h2d
    )
    inputs = frozenset(f"{i}.input" for i in range(n))
    attention = frozenset(f"{i}.attention" for i in range(n))
    cheap = ("norm1", "norm2", "gelu")
    anchors = (
        inputs | attention,
        frozenset(a.name for a in activations if a.name.split(".")[1] not in cheap),
        inputs | attention | frozenset(f"{i}.{s}" for i in range(n) for s in ("q", "k", "v", "residual")),
        inputs,
        frozenset(a.name for a in activations),
    )
    return Stack(problem, needs, layer_of, inputs, attention, anchors)


def row_of(c: Case) -> dict[str, Any]:
    """One cell, all strategies."""
    stack = stack_of(c)
    peak = c.profile.flops("bfloat16")
    row: dict[str, Any] = {
        "model": c.preset.name,
        "gpus": c.gpus,
        "tokens": c.tokens,
        "saved_gib": sum(a.bytes for a in stack.problem.activations) * c.gpus / 2**30,
        "inputs_gib": sum(a.bytes for a in stack.problem.activations if a.name in stack.inputs) * c.gpus / 2**30,
        "layer_gib": UNITS * c.unit * c.gpus / 2**30,
    }
    started = time.perf_counter()
    for name, outcome in outcomes(stack).items():
        row[name] = None if outcome is None else _figures(c, outcome, model_flops(c) / peak)
    row["planning_seconds"] = time.perf_counter() - started
    others = [row[s]["seconds"] for s in STRATEGIES if s != "memo" and row[s]]
    if others and row["memo"]:
        row["of_best_other"] = row["memo"]["seconds"] / min(others)
    return row


def _figures(c: Case, outcome: Outcome, ideal: float) -> dict[str, Any]:
    played, predicted = outcome.played, outcome.predicted
    return {
        "seconds": played.seconds,
        "mfu": ideal / played.seconds,
        "peak_gib": played.peak / 2**30,
        "host_gib": played.offloaded_bytes / 2**30,
        "recompute_seconds": played.recompute_seconds,
        "stall_seconds": sum(played.stalls.values()),
        "overlap": played.overlap,
        "alpha": outcome.share,
        **(
            {}
            if predicted is None
            else {
                "predicted_over_simulated_seconds": predicted.seconds / played.seconds,
                "predicted_over_simulated_peak": predicted.peak / played.peak,
                "binding": predicted.binding,
                "prices": dict(predicted.prices),
                "program_seconds": predicted.solver_seconds,
            }
        ),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds of a step by strategy, and memo's against the others'."""
    names = list(STRATEGIES)
    head = ["model", "GPUs", "tokens", *names, "MFU", "× best other", "× full recompute", "× alpha"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        ours = r["memo"]
        cells = [r["model"], str(r["gpus"]), f"{r['tokens'] // K}K"]
        cells += [f"{r[n]['seconds']:.2f}" if r[n] else "–" for n in names]
        cells.append(f"{ours['mfu']:.1%}" if ours else "–")
        cells.append(f"{r['of_best_other']:.4f}" if "of_best_other" in r else "–")
        cells += [
            f"{ours['seconds'] / r[n]['seconds']:.3f}" if ours and r[n] else "–" for n in ("full recompute", "alpha")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = "\n".join(f"- {a}" for a in ASSUMPTIONS)
    ours = next((r["memo"] for r in rows if r["model"] == "gpt-7b" and r["tokens"] == K * K and r["memo"]), None)
    gaps = [
        max(abs(r["memo"][f"predicted_over_simulated_{what}"] - 1) for r in rows if r["memo"])
        for what in ("seconds", "peak")
    ]
    predicted = (
        f"\nThe linear program against the simulator, at worst: {gaps[0]:.2%} in seconds, {gaps[1]:.2%} in peak.\n"
    )
    beside = (
        f"\n\nMFU at 7B and 1M tokens: {ours['mfu']:.1%} simulated, {PAPER_MFU_7B_1M:.1%} in the paper.\n"
        if ours
        else "\n"
    )
    return (
        "Simulated seconds of a training step; – where a strategy does not fit.\n\n"
        + "\n".join(lines)
        + beside
        + predicted
        + f"\nAssumptions:\n\n{notes}"
    )


def main() -> None:
    """Run the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS))
    asked = parser.parse_args()
    rows = []
    for name in asked.models:
        for tokens in asked.lengths:
            rows.append(row_of(case(name, tokens)))
            shown = {k: round(v["seconds"], 2) if isinstance(v, dict) else v for k, v in rows[-1].items()}
            print(shown, flush=True)
    if asked.models == list(GPUS) and asked.lengths == list(LENGTHS):
        save("paper", "python -m bench.paper", rows, table(rows))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
