"""Llama-8B at a million tokens on eight devices, planned: tokens shared out, or each layer, beside a published run.

    python -m bench.devices [--tokens 1048576]

Nothing runs: one rank's graph is traced on fake tensors, and the linear program decides (`memo plan`).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from bench.common import save
from memo_compile.forecast.forecast import Asked, Forecast, forecast_preset
from memo_compile.forecast.parallel import Layout, layout

GPUS, GIB = 8, 2**30
PRESET, HARDWARE, HOST = "llama-8b", "h100", 2 * 2**40
LAYOUTS = {"tokens (--cp 8)": layout(GPUS, 1, 3, cp=8), "layers (--tp 8)": layout(GPUS, 8, 3)}
# https://huggingface.co/docs/trl: Qwen3-8B, 8 H100 of 80 GB, ALST with ZeRO 3, 1M tokens.
PUBLISHED = "| published, measured (TRL with ALST, Qwen3-8B) | 345 | | 56 GB | | |"
ASSUMPTIONS = (
    "h100 as in the built-in profile, whose rates are no measurement; bfloat16, Adam, ZeRO 3; one sequence",
    "collectives of the sequence or of the layers take their time one after another with the kernels; gathers of "
    "parameters by ZeRO take none",
    f"{HOST // 2**40} TiB of host memory for the machine, 5 % of the device's memory left alone",
    "in all: parameters, gradients, optimizer and what is gathered of them, activations and transients at their peak",
    "the published run is of a model of the same size, with 36 layers, a narrower MLP and 151 936 words, not 128 256",
)


def main() -> None:
    """Plan, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    tokens = parser.parse_args().tokens
    rows = [row(name, where, tokens) for name, where in LAYOUTS.items()]
    save("devices", f"python -m bench.devices --tokens {tokens}", rows, table(rows))


def row(name: str, where: Layout, tokens: int) -> dict[str, Any]:
    """What is planned for one layout."""
    found = forecast_preset(Asked(PRESET, tokens, where, HARDWARE, HOST))
    return {"name": name, "layout": asdict(where), "tokens": tokens, **_figures(found)}


def _figures(f: Forecast) -> dict[str, Any]:
    return {
        "fits": f.fits,
        "rate": f.tokens_per_second / GPUS,
        "mfu": f.mfu,
        "bytes": f.state.total + f.peak,
        "host_bytes": f.offloaded,
        "recompute": f.recompute_seconds / f.step_seconds,
        "tiles": f.tiles,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows beside the published one."""
    head = f"{PRESET}, {rows[0]['tokens']:,} tokens, {GPUS} × {HARDWARE}; planned\n\n"
    head += "| shared out | tokens/s a device | MFU | in all, at most | on the host | recomputing, tiles |\n"
    lines = [
        f"| {r['name']}{'' if r['fits'] else ', does not fit'} | {r['rate']:.0f} | {r['mfu']:.1%} | "
        f"{r['bytes'] / GIB:.1f} GiB | {r['host_bytes'] / GIB:.0f} GiB | {r['recompute']:.0%}, {r['tiles']} |"
        for r in rows
    ]
    assumed = "\n".join(f"- {a}" for a in ASSUMPTIONS)
    return head + "|" + "---|" * 6 + "\n" + "\n".join([*lines, PUBLISHED]) + f"\n\nAssumed:\n\n{assumed}"


if __name__ == "__main__":
    main()
