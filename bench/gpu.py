"""Training steps at long sequences: memo against what a user would pick instead, rows chosen by hand.

    python -m bench.gpu [--parts standard gpt-7b longer longest layers] [--peers …] [--device cuda|cpu] [--tiny]

`bench.device` runs the rows that matter most by itself; this runs those that are named. Each is measured in a process
of its own and stored at once: a run that is cut off, or that has used `--time-limit` seconds, goes on where it stopped
when it is started again. Peers with another's peak (`memo@checkpoint`) come after it. `--tiny` shrinks every size, so
that the program itself can be tested on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import pages, roster
from bench.common import RESULTS
from bench.measurement import Case
from bench.peers import AT
from bench.provenance import card
from bench.rows import NothingToStandOn, Row, Rows, parts_beside
from bench.worker import Runner

K = 1024
PARTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {  # model, layers, tokens
    "standard": ("llama-8b", (4,), (8 * K, 64 * K, 128 * K)),
    "gpt-7b": ("gpt-7b", (4,), (8 * K, 64 * K, 128 * K)),
    "longer": ("llama-8b", (4,), (256 * K, 512 * K)),
    "layers": ("llama-8b", (8, 16), (64 * K,)),
    "longest": ("llama-8b", (4,), ()),
}
DEFAULT_PEERS = [
    *roster.ALL,
    "memo-auto",
    "memo-min",
    *(f"{AT}{p}" for p in ("checkpoint", "checkpoint+streams", "inductor")),
]


def cases_of(part: str, options: argparse.Namespace) -> Iterator[Case]:
    """The rows of a part but `longest`, in the order in which they are measured."""
    model, layers, tokens = PARTS[part]
    if options.tiny:
        layers, tokens = (1,), tuple(sorted({max(128, t // 512) for t in tokens}))[:1]
    for n in layers:
        for t in options.tokens or tokens:
            for peer in options.peers:
                yield replace(_plain(options), model=model, layers=n, tokens=t, peer=peer)


def _plain(options: argparse.Namespace) -> Case:
    return Case("", 0, 0, "", limit=options.limit, tiny=options.tiny, device=options.device, steps=options.steps)


class Benchmark:
    """Measures rows until the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.card = card(options.device)
        self.rows = Rows(options.out)
        self.runner = Runner(self.rows, self.card, options.in_process)
        self.until = time.monotonic() + options.time_limit

    def row(self, case: Case) -> Row | None:
        """A row, from the results where it is there and current; None where the time is up."""
        known = self.rows.current(self.card, case)
        if known is not None:
            return known
        left = self.until - time.monotonic()
        if left <= 0:
            return None
        try:
            row = self.runner.measure(case, left)
        except NothingToStandOn as error:
            return {"failed": str(error)}
        if row is not None:
            print(case.key, row.get("failed") or f"{row['tokens_per_second']:.0f} tokens/s", flush=True)
        return row

    def part(self, name: str) -> bool:
        """Measure a part; False where the time was up before its end."""
        if name == "longest":
            return all(self.longest(peer) for peer in self.options.peers if not peer.startswith(AT))
        return all(self.row(case) is not None for case in cases_of(name, self.options))

    def longest(self, peer: str) -> bool:
        """The longest length that trains, to an eighth of it: doubled until it fails, then halved in between."""
        o = self.options
        unit = 128 if o.tiny else 8 * K
        model, (layers,), _ = PARTS["longest"]
        good, bad = 0, 0
        while not bad or bad - good > max(unit, good // 8):
            tokens = (good + bad) // 2 // unit * unit if bad else max(unit, 2 * good)
            if tokens in (good, bad) or tokens > o.most:
                break
            row = self.row(replace(_plain(o), model=model, layers=layers, peer=peer, tokens=tokens))
            if row is None:
                return False
            good, bad = (good, tokens) if "failed" in row else (tokens, bad)
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 where all is measured, 3 where the time was up before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["standard"], choices=list(PARTS))
    parser.add_argument("--peers", nargs="+", default=DEFAULT_PEERS)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a row (2)")
    parser.add_argument("--tokens", nargs="+", type=int, help="these lengths instead of the parts' own")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of the program itself")
    parser.add_argument("--in-process", action="store_true", help="no process of its own for each row")
    parser.add_argument("--limit", type=int, default=0, help="bytes that a CPU stands for as a device")
    parser.add_argument("--most", type=int, default=4096 * K, help="the longest length to try")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    unknown = [p for p in options.peers if not roster.is_known(p)]
    if unknown:
        parser.error(f"unknown peers {', '.join(unknown)}; there are {', '.join(roster.ALL)}, memo-BUDGET, {AT}PEER")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu --tiny tests the program itself")
    benchmark = Benchmark(options)
    finished = all(benchmark.part(name) for name in options.parts)
    benchmark.runner.close()
    pages.write(benchmark.rows, parts_beside(options.out))
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
