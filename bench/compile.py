"""Seconds to the end of the first step, cold and warm: memo beside stock Inductor, by the number of layers.

    python -m bench.compile [--models hf-llama llama] [--layers 4 8 16 32] [--budgets none 0.5 min] [--tokens 256]

Each figure is of a process of its own, from the call of the compiled model to the end of its first backward; the second
process of a pair finds what the first has left in the pair's folder of caches, otherwise empty. Kernels are compiled by
the process itself (`compile_threads` is 1) so that processor seconds count them, and the header that all of Inductor's
kernels share is compiled before. Processor seconds are those of the process and its children.

Of memo's parts, "dry runs" has the lowering of what was taken, too, which the compilation goes on with: "lowering" is
what is left of it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.common import ROOT, VOCABULARY, reference_llama, save
from memo_compile.models import hugging_face

log = logging.getLogger(__name__)

WIDTH, HEADS, FFN = 64, 4, 192
HOST = 2**32  # bytes: the same in both processes, however much is free
SEED = 0
PARTS = ("planning", "dry runs", "lowering", "kernels")


def hf_llama(layers: int) -> torch.nn.Module:
    """Hugging Face's, in float32, narrow: compiling takes as long as for a wide one."""
    return hugging_face.hf_llama(
        vocab=VOCABULARY, layers=layers, width=WIDTH, heads=HEADS, kv_heads=HEADS // 2, ffn=FFN
    )


MODELS: dict[str, Callable[[int], torch.nn.Module]] = {
    "hf-llama": hf_llama,
    "llama": lambda layers: reference_llama(layers, 0),
}


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


class Parts:
    """Processor seconds by part: what is called within a part counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner, self._dry = 0.0, False

    def timed(self, part: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, whose seconds are those of `part`."""

        def run(*args: Any, **keywords: Any) -> Any:
            if self._dry:  # what a dry run calls is its own
                return fn(*args, **keywords)
            before, started = self._inner, processor_seconds()
            self._inner, self._dry = 0.0, part == "dry runs"
            try:
                return fn(*args, **keywords)
            finally:
                self._dry = False
                took = processor_seconds() - started
                self.seconds[part] += took - self._inner
                self._inner = before + took

        return run

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, memo's compilations are timed."""
        from torch._inductor import compile_fx

        from memo_compile.codegen.compiler import _Compilation
        from memo_compile.codegen.kernels import Awaited
        from memo_compile.codegen.rehearsal import Rehearsal

        places: tuple[tuple[Any, str, str], ...] = (
            (_Compilation, "partition", "planning"),
            (Rehearsal, "dry", "dry runs"),
            (compile_fx, "compile_fx_inner", "lowering"),
            (Awaited, "result", "kernels"),
        )
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield


def step(model: str, layers: int, tokens: int, backend: str, budget: str) -> dict[str, Any]:
    """One first step in this process."""
    torch.manual_seed(SEED)
    made, batch = MODELS[model](layers), torch.randint(0, VOCABULARY, (1, tokens))
    options: dict[str, Any] = {"host_budget": HOST}
    if budget != "none":
        options["memory_budget"] = budget
    how: dict[str, Any] = {"backend": backend, **({"options": options} if backend == "memo" else {})}
    parts = Parts()
    clock, processor = time.perf_counter(), processor_seconds()
    with ExitStack() as stack:
        if backend == "memo":
            stack.enter_context(parts.watched())
        result = torch.compile(made, **how)(batch, labels=batch)
        loss = result if isinstance(result, torch.Tensor) else result.loss
        loss.backward()
    from torch._dynamo.utils import counters

    return {
        "clock": time.perf_counter() - clock,
        "processor": processor_seconds() - processor,
        "parts": parts.seconds,
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "loss": float(loss.detach()),
    }


def in_process(folder: Path, *arguments: object) -> dict[str, Any]:
    """`step` in a process of its own, with its caches in a folder."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MEMO_CACHE": "1",
    }
    command = [sys.executable, "-m", "bench.compile", "--one", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    log.info("%s: %s", arguments, row)
    return row


@cache
def with_header() -> Path:
    """A folder of caches that has the header alone; it is deleted when the program ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    in_process(folder, "header", 0, 0, "inductor", "none")
    return folder


def pair(model: str, layers: int, tokens: int, backend: str, budget: str) -> dict[str, Any]:
    """A cold process and a warm one after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(with_header(), folder, dirs_exist_ok=True)
        cold, warm = (in_process(folder, model, layers, tokens, backend, budget) for _ in range(2))
    if not warm["hits"] or abs(cold["loss"] - warm["loss"]) > 1e-5 * abs(cold["loss"]):
        raise RuntimeError(f"{model}, {layers} layers, {backend}: the second process did not find what the first left")
    return {"cold": cold, "warm": warm}


def rows_of(
    models: Sequence[str], layers: Sequence[int], budgets: Sequence[str], tokens: int
) -> Iterator[list[dict[str, Any]]]:
    """Inductor's figures and memo's, paired: one beside the other in one run. All rows so far, after each model."""
    rows: list[dict[str, Any]] = []
    for count, model in product(layers, models):
        stock = pair(model, count, tokens, "inductor", "none")
        for budget in budgets:
            own = pair(model, count, tokens, "memo", budget)
            rows.append({"model": model, "layers": count, "budget": budget, "inductor": stock, "memo": own})
        yield rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Processor seconds (clock seconds) of both, their ratio, and the parts of memo's cold compilation."""
    names = ["model", "layers", "budget", "cold: Inductor", "memo", "ratio", "warm: Inductor", "memo", "ratio", *PARTS]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row["model"], str(row["layers"]), row["budget"]]
        for when in ("cold", "warm"):
            stock, own = row["inductor"][when], row["memo"][when]
            cells += [_seconds(stock), _seconds(own), f"{own['processor'] / stock['processor']:.2f}"]
        cells += [f"{row['memo']['cold']['parts'][part]:.1f}" for part in PARTS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(figures: dict[str, Any]) -> str:
    return f"{figures['processor']:.1f} ({figures['clock']:.1f})"


def compile_header() -> None:
    """The header that Inductor's C++ kernels share, once for a folder."""
    torch.compile(lambda x: x.sin() + 1)(torch.ones(8))


def main() -> None:
    """Write `bench/results/compile.md` and `.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--layers", nargs="*", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--budgets", nargs="*", default=["none", "0.5", "min"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--one", nargs=5)
    arguments = parser.parse_args()
    if arguments.one is not None:
        model, layers, tokens, backend, budget = arguments.one
        if model == "header":
            compile_header()
            print("{}")
        else:
            print(json.dumps(step(model, int(layers), int(tokens), backend, budget)))
        return
    logging.basicConfig(level=logging.INFO)
    for rows in rows_of(arguments.models, arguments.layers, arguments.budgets, arguments.tokens):
        save("compile", shlex.join(["python", "-m", "bench.compile", *sys.argv[1:]]), rows, table(rows))


if __name__ == "__main__":
    main()
