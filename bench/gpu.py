"""Training steps at long sequences: memo against what a user would pick instead, in one run.

    python -m bench.gpu [--parts standard gpt-7b longer longest layers] [--peers …] [--device cuda|cpu] [--tiny]

Every row is one peer at one length, measured in a process of its own, and stored at once: a run that is cut off, or
that has used `--time-limit` seconds, goes on where it stopped when it is started again. Peers with another's peak
(`memo@checkpoint`) come after it. Figures: tokens/s, MFU with causal attention, peak bytes allocated and reserved, host
bytes, seconds to compile, loss. `--tiny` shrinks every size, so that the program itself can be tested on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import memo_compile
from bench.common import RESULTS, machine
from bench.peers import AT, PEERS, Trained, memo
from memo_compile.errors import BudgetTooSmall
from memo_compile.hardware.profiles import resolve
from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig
from memo_compile.runtime.ops import pool

GIB = 2**30
K = 1024


@dataclass(frozen=True)
class Case:
    """One row to measure. `limit` is the bytes that a CPU stands for as a device; 0 for the device's own."""

    part: str
    model: str
    layers: int
    tokens: int
    peer: str
    budget: int = 0
    limit: int = 0
    tiny: bool = False
    device: str = "cuda"
    steps: int = 2  # timed, after two that compile and warm up

    @property
    def key(self) -> str:
        """What the row is stored under."""
        return f"{self.part}/{self.model}/{self.layers}/{self.tokens}/{self.peer}"


PARTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {  # model, layers, tokens
    "standard": ("llama-8b", (4,), (8 * K, 64 * K, 128 * K)),
    "gpt-7b": ("gpt-7b", (4,), (8 * K, 64 * K, 128 * K)),
    "longer": ("llama-8b", (4,), (256 * K, 512 * K)),
    "layers": ("llama-8b", (8, 16), (64 * K,)),
    "longest": ("llama-8b", (4,), ()),
}


def make_model(case: Case) -> Trained:
    """The model of a case, from seed 0, in bfloat16 on CUDA and in float32 on the CPU."""
    torch.manual_seed(0)
    if case.model == "llama-8b":
        full = LlamaConfig(128256, case.layers, 4096, 32, 8, 14336, 500000.0)
        small = LlamaConfig(vocab=64, layers=1, width=32, heads=4, kv_heads=2, ffn=96)
        model: torch.nn.Module = Llama(small if case.tiny else full)
    else:
        wide = GPTConfig(vocab=50257, layers=case.layers, width=4096, heads=32, tokens=case.tokens)
        model = GPT(GPTConfig(vocab=64, layers=1, width=32, heads=4, tokens=case.tokens) if case.tiny else wide)
    dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
    return Trained(model.to(dtype=dtype)).to(case.device)


def model_flops(trained: Trained, tokens: int) -> float:
    """FLOPs of one step: 6 a parameter and token, 6·S²·width a layer of causal attention; no recomputation."""
    model: Any = trained.model
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    looked_up = model.embedding.weight.numel() if model.head.weight is not model.embedding.weight else 0
    if getattr(model, "positions", None) is not None:
        looked_up += model.positions.weight.numel()
    return 6.0 * (weights - looked_up) * tokens + 6.0 * len(model.blocks) * tokens**2 * model.config.width


def measure(case: Case) -> dict[str, Any]:
    """One row; `failed` says why where there are no figures."""
    torch._dynamo.reset()
    memo_compile.reset()
    try:
        return _measure(case)
    except (torch.OutOfMemoryError, memo_compile.MemoError, NotImplementedError, RuntimeError) as error:
        cause: BaseException = getattr(error, "inner_exception", error)
        row: dict[str, Any] = {"failed": type(cause).__name__, "said": str(cause)[:400]}
        if isinstance(cause, BudgetTooSmall):
            row["least"] = cause.least
        return row


def _measure(case: Case) -> dict[str, Any]:
    cuda = case.device == "cuda"
    trained = make_model(case)
    make = PEERS[case.peer] if case.peer in PEERS else memo(memory_budget=case.budget)
    vocabulary = trained.model.head.weight.shape[0]
    x = torch.randint(0, vocabulary, (1, case.tokens), device=case.device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=cuda)
    run = make(trained)
    losses = []
    clock = _Clock(cuda)

    def step() -> None:
        loss = run(x, x)
        loss.backward()
        losses.append(loss.detach())
        with clock:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    started = time.perf_counter()
    step()
    _synchronize(cuda)
    first = time.perf_counter() - started
    held = torch.cuda.memory_allocated() if cuda else 0
    peak = memo_compile.measure_peak(step)
    reserved = torch.cuda.max_memory_reserved() if cuda else 0
    host_before = memo_compile.transfer_stats()
    started = time.perf_counter()
    for _ in range(case.steps):
        step()
    _synchronize(cuda)
    seconds = (time.perf_counter() - started) / case.steps
    updating = clock.seconds(case.steps)
    moved = memo_compile.transfer_stats()
    if case.limit and peak > case.limit:
        return {"failed": "OutOfMemory", "said": f"{peak} bytes held, the device stands for {case.limit}", "peak": peak}
    row: dict[str, Any] = {
        "seconds": seconds,
        "model_seconds": seconds - updating,  # without the optimizer
        "tokens_per_second": case.tokens / seconds,
        "mfu": model_flops(trained, case.tokens) / seconds / _peak_flops(cuda),
        "peak": peak,  # above parameters and optimizer state
        "allocated": held + peak,
        "reserved": reserved,
        "host_bytes": pool().held_bytes + _pinned_elsewhere(cuda),
        "pinned_elsewhere": _pinned_elsewhere(cuda),
        "first_step_seconds": first,
        "compile_seconds": max(0.0, first - seconds),
        "losses": [float(v) for v in losses],
    }
    plans = memo_compile.plans()
    if case.peer.startswith("memo") and plans:
        plan = plans[-1]
        row |= {
            "plans": len(plans),
            "budget": plan.budget,
            "predicted_peak": plan.predicted_peak,
            "predicted_seconds": plan.predicted_seconds,
            "planned_host_bytes": plan.host_bytes,
            "moved_out": (moved.bytes_out - host_before.bytes_out) // case.steps,
            "planned_out": plan.offloaded_bytes,
            "recomputed_share": plan.recomputed_flops_share,
            "coverage": plan.coverage,
        }
    return row


class _Clock:
    """How long what runs within it takes: on CUDA by events on the current stream, which delay nothing."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[Any] = []

    def _mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *exc: object) -> None:
        self._mark()

    def seconds(self, last: int) -> float:
        """The mean over the last few times. The device is idle."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))[-last:]
        each = [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs]
        return sum(each) / len(each)


def _pinned_elsewhere(cuda: bool) -> int:
    """Bytes that torch has page-locked at most, for anyone but memo, whose blocks are its own."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)) if cuda else 0


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _peak_flops(cuda: bool) -> float:
    return resolve("auto", "cuda" if cuda else "cpu").flops("bfloat16" if cuda else "float32")


def measure_apart(case: Case) -> dict[str, Any]:
    """The same in a process of its own, where nothing is left of other peers; expandable segments for all."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-m", "bench.gpu", "--one", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": "died", "said": done.stderr[-400:]}


class Results:
    """Rows by key, in one JSON file that is written after every row."""

    def __init__(self, path: Path, command: str) -> None:
        self.path, self.command = path, command
        self.rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}

    def add(self, case: Case, row: dict[str, Any]) -> None:
        """Store a row, and the tables anew."""
        self.rows[case.key] = {**asdict(case), **row}
        made_with = machine()
        if torch.cuda.is_available():
            made_with["device"] = torch.cuda.get_device_name()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = {"command": self.command, "machine": made_with, "rows": self.rows}
        self.path.write_text(json.dumps(text, indent=1) + "\n")
        where = ", ".join(f"{key} {value}" for key, value in made_with.items())
        self.path.with_suffix(".md").write_text(f"`{self.command}`\n\n{where}\n\n{table(list(self.rows.values()))}\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| part | model | layers | tokens | peer | tokens/s | MFU | peak GiB | reserved GiB | host GiB "
        "| compile s | loss | predicted peak | predicted time |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        start = f"| {r['part']} | {r['model']} | {r['layers']} | {r['tokens']} | {r['peer']} |"
        if "failed" in r:
            lines.append(f"{start} {r['failed']} | | | | | | | | |")
            continue
        cells = [
            f"{r['tokens_per_second']:.0f}",
            f"{r['mfu']:.1%}",
            f"{r['peak'] / GIB:.3f}",
            f"{r['reserved'] / GIB:.3f}",
            f"{r['host_bytes'] / GIB:.3f}",
            f"{r['compile_seconds']:.1f}",
            f"{r['losses'][-1]:.4f}",
            f"{r['predicted_peak'] / r['peak'] - 1:+.2%}" if "predicted_peak" in r else "",
            f"{r['predicted_seconds'] / r['model_seconds'] - 1:+.1%}" if "predicted_seconds" in r else "",
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens/s and peak over the length, a line a peer. Needs the `plot` extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(12, 5))
    measured = [r for r in rows if "failed" not in r and r["part"] in ("standard", "longer")]
    for peer in dict.fromkeys(r["peer"] for r in measured):
        mine = sorted((r["tokens"], r["tokens_per_second"], r["peak"] / GIB) for r in measured if r["peer"] == peer)
        speed.plot([m[0] for m in mine], [m[1] for m in mine], marker="o", label=peer)
        memory.plot([m[0] for m in mine], [m[2] for m in mine], marker="o", label=peer)
    for axes, title in ((speed, "tokens/s"), (memory, "peak GiB above parameters and optimizer")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(title)
    speed.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def cases_of(part: str, peers: Sequence[str], options: argparse.Namespace) -> list[Case]:
    """The rows of a part but `longest`, in the order in which they are measured."""
    model, layers, tokens = PARTS[part]
    if options.tiny:
        layers, tokens = (1,), tuple(sorted({max(128, t // 512) for t in tokens}))[:1]
    if options.tokens:
        tokens = tuple(options.tokens)
    return [
        Case(
            part, model, n, t, peer, limit=options.limit, tiny=options.tiny, device=options.device, steps=options.steps
        )
        for n in layers
        for t in tokens
        for peer in peers
    ]


class Benchmark:
    """Measures rows until the time is up."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.until = time.monotonic() + options.time_limit

    def row(self, case: Case) -> dict[str, Any] | None:
        """A row, from the results where it is there; None where the time is up."""
        if case.key in self.results.rows:
            known: dict[str, Any] = self.results.rows[case.key]
            return known
        if time.monotonic() > self.until:
            return None
        if case.peer.startswith(AT):
            other = self.results.rows.get(
                replace(case, peer=case.peer.removeprefix(AT)).key, {"failed": "not measured"}
            )
            if "failed" in other:
                return {"failed": f"{case.peer.removeprefix(AT)}: {other['failed']}"}
            case = replace(case, budget=int(other["peak"]))
        row = measure(case) if self.options.in_process else measure_apart(case)
        self.results.add(case, row)
        print(table([self.results.rows[case.key]]).splitlines()[-1], flush=True)
        return row

    def part(self, name: str) -> bool:
        """Measure a part; False where the time was up before its end."""
        if name == "longest":
            return all(self.longest(peer) for peer in self.options.peers if not peer.startswith(AT))
        return all(self.row(case) is not None for case in cases_of(name, self.options.peers, self.options))

    def longest(self, peer: str) -> bool:
        """The longest length that trains, to an eighth of it: doubled until it fails, then halved in between."""
        o = self.options
        unit = 128 if o.tiny else 8 * K
        model, (layers,), _ = PARTS["longest"]
        case = Case("longest", model, layers, unit, peer, limit=o.limit, tiny=o.tiny, device=o.device, steps=o.steps)
        good, bad = 0, 0
        while not bad or bad - good > max(unit, good // 8):
            tokens = (good + bad) // 2 // unit * unit if bad else max(unit, 2 * good)
            if tokens in (good, bad) or tokens > o.most:
                break
            row = self.row(replace(case, tokens=tokens))
            if row is None:
                return False
            good, bad = (good, tokens) if "failed" in row else (tokens, bad)
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 where all is measured, 3 where the time was up before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["standard"], choices=list(PARTS))
    default_peers = [*PEERS, *(f"{AT}{p}" for p in ("checkpoint", "checkpoint+streams", "inductor"))]
    parser.add_argument("--peers", nargs="+", default=default_peers)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a row (2)")
    parser.add_argument("--tokens", nargs="+", type=int, help="these lengths instead of the parts' own")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of the program itself")
    parser.add_argument("--in-process", action="store_true", help="no process of its own for each row")
    parser.add_argument("--limit", type=int, default=0, help="bytes that a CPU stands for as a device")
    parser.add_argument("--most", type=int, default=4096 * K, help="the longest length to try")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(Case(**json.loads(options.one)))), flush=True)
        return 0
    unknown = [p for p in options.peers if p.removeprefix(AT) not in PEERS]
    if unknown:
        parser.error(f"unknown peers {', '.join(unknown)}; there are {', '.join(PEERS)}, and {AT}PEER")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu --tiny tests the program itself")
    command = "python -m bench.gpu " + " ".join(sys.argv[1:] if arguments is None else arguments)
    benchmark = Benchmark(options, Results(options.out, command))
    finished = all(benchmark.part(name) for name in options.parts)
    if not options.no_plot:
        plot(list(benchmark.results.rows.values()), options.out.with_suffix(".png"))
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
