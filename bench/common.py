"""What the benchmarks share: the models, a step, and where the figures were made."""

from __future__ import annotations

import atexit
import json
import os
import platform
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import memo_compile
from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig, hugging_face

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
VOCABULARY = 512
WIDTH = 256


def reference_llama(layers: int, tokens: int) -> torch.nn.Module:
    """The package's Llama, in float32."""
    return Llama(LlamaConfig(vocab=VOCABULARY, layers=layers, width=WIDTH))


def reference_gpt(layers: int, tokens: int) -> torch.nn.Module:
    """The package's GPT, in float32, without dropout."""
    return GPT(GPTConfig(vocab=VOCABULARY, layers=layers, width=WIDTH, tokens=tokens))


def hf_gpt2(layers: int, tokens: int, dropout: float) -> torch.nn.Module:
    """Hugging Face's GPT-2, in float32, training."""
    return hugging_face.hf_gpt2(vocab=VOCABULARY, layers=layers, width=WIDTH, heads=8, tokens=tokens, dropout=dropout)


MODELS: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "llama": reference_llama,
    "gpt": reference_gpt,
    "hf-gpt2": lambda layers, tokens: hf_gpt2(layers, tokens, 0.0),
    "hf-gpt2-dropout": lambda layers, tokens: hf_gpt2(layers, tokens, 0.1),
}


def make(name: str, layers: int, tokens: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model and a batch of one sequence, from seed 0."""
    torch.manual_seed(0)
    return MODELS[name](layers, tokens), torch.randint(0, VOCABULARY, (1, tokens))


def checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with every block checkpointed, as a user would do it in eager."""
    from torch.utils.checkpoint import checkpoint

    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    return model


def train_step(fn: Any, x: torch.Tensor) -> float:
    """Forward and backward from one seed; returns the loss."""
    torch.manual_seed(1)
    result = fn(x, labels=x)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    loss.backward()
    return float(loss.detach())


def measured(model: torch.nn.Module, fn: Any, x: torch.Tensor, repeats: int = 3) -> dict[str, float]:
    """Seconds of the first step and of the fastest later one, peak bytes of a step, loss."""
    started = time.perf_counter()
    loss = train_step(fn, x)
    first = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    peak = memo_compile.measure_peak(train_step, fn, x)
    seconds = []
    for _ in range(repeats):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        train_step(fn, x)
        seconds.append(time.perf_counter() - started)
    model.zero_grad(set_to_none=True)
    return {"first_step_seconds": first, "step_seconds": min(seconds), "peak": peak, "loss": loss}


def child_environment() -> dict[str, str]:
    """The environment in which a child finds this checkout's package and its backends, installed or not."""
    paths = [str(ROOT), _metadata(), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


@cache
def _metadata() -> str:
    """A folder with what an installed package says of itself: `torch.compile` finds backends by entry points."""
    folder = Path(tempfile.mkdtemp(prefix="memo-metadata-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    there = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    there.mkdir()
    (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
    (there / "entry_points.txt").write_text("\n".join(lines))
    return str(folder)


def machine() -> dict[str, Any]:
    """What the figures were made with."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "memo": memo_compile.__version__,
    }


def save(name: str, command: str, rows: list[dict[str, Any]], table: str) -> None:
    """Write `NAME.json` and `NAME.md` into the results."""
    RESULTS.mkdir(exist_ok=True)
    made_with = machine()
    text = json.dumps({"command": command, "machine": made_with, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    where = ", ".join(f"{key} {value}" for key, value in made_with.items())
    (RESULTS / f"{name}.md").write_text(f"`{command}`\n\n{where}\n\n{table}\n")
