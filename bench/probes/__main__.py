"""Ask one question; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import torch

import bench.probes
from bench.probes import host, kernels, steps
from bench.probes.timing import Answer, AsksCuda, Scene

PROBES: dict[str, Callable[[Scene], Answer]] = {
    "link": host.link,
    "locking": host.locking,
    "pieces": host.pieces,
    "pins": host.pins,
    "dropout": steps.dropout,
    "graphs": steps.graphs,
    "prefetch_buffers": steps.prefetch_buffers,
    "lengths": steps.lengths,
    "pinned": steps.pinned,
    "step": kernels.step,
    "profile": kernels.profile,
}


def answer(name: str, scene: Scene) -> Answer:
    """What it finds; `skipped` where only a CUDA device can be asked."""
    try:
        return PROBES[name](scene)
    except AsksCuda:
        return {"skipped": "asks a CUDA device"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask one, and write the answer."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.probes",
        description=bench.probes.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("--tiny", action="store_true", help="in small, on the CPU")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("probes ask a CUDA device, and none is here")
    print(json.dumps(answer(options.name, Scene(tiny=options.tiny))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
