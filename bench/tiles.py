"""The least that training holds where the vocabulary is large: memo's tiles beside what else makes no whole logits.

    python -m bench.tiles [--parts losses models floors] [--models llama gpt …]

* losses: one Llama by one loss after the other: whole, by Inductor's auto_chunker, by torch's `linear_cross_entropy`,
  chunked by hand, by memo. Its layers are compiled in every row.
* models: Hugging Face's, through `loss_only`, against gradients and 15 % of Inductor's peak.
* floors: 8 layers, beside every layer checkpointed in eager with a loss chunked by hand, and in units H of one
  (tokens × width) tensor.

Caches are off; peaks are measured at the allocator over one step, and hold the gradients. Parts that are not named keep
the rows that they have.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memo_compile
from bench.common import RESULTS, checkpointed, measured, save
from bench.models import shifted
from bench.peers import _hidden
from bench.tiled import _TiledLoss
from memo_compile.logs import MIB
from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig, hugging_face

LARGE = 32_000  # words
CHUNKS = 16  # of a loss by hand
SHARE = 0.15  # of Inductor's peak
MIN: dict[str, Any] = {"memory_budget": "min"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch of one sequence."""

    vocab: int
    layers: int
    width: int
    tokens: int

    @property
    def h(self) -> int:
        """Bytes of one (tokens × width) tensor."""
        return 4 * self.tokens * self.width

    @property
    def ids(self) -> Tensor:
        """A batch, from seed 0."""
        return torch.randint(0, self.vocab, (1, self.tokens), generator=torch.Generator().manual_seed(0))


Make = Callable[[Sizes], nn.Module]


def _hf(name: str, s: Sizes, **more: Any) -> nn.Module:
    return hugging_face.hf_decoder(
        name, vocab=s.vocab, layers=s.layers, width=s.width, heads=4, kv_heads=2, ffn=7 * s.width // 2, **more
    )


def _gpt2(s: Sizes) -> nn.Module:
    heads = s.width // 32
    return hugging_face.hf_gpt2(vocab=s.vocab, layers=s.layers, width=s.width, heads=heads, tokens=s.tokens)


MODELS: dict[str, Make] = {
    "hf-llama": partial(_hf, "Llama"),
    "hf-qwen3": partial(_hf, "Qwen3", head_dim=32),
    "hf-gemma2": partial(_hf, "Gemma2", head_dim=32, attn_implementation="eager"),
    "hf-gpt2": _gpt2,
    "hf-t5": lambda s: hugging_face.hf_t5(vocab=s.vocab, layers=s.layers, width=s.width, heads=4, ffn=4 * s.width),
}
FLOORS: dict[str, Make] = {
    "llama": lambda s: Llama(LlamaConfig(vocab=s.vocab, layers=s.layers, width=s.width)),
    "gpt": lambda s: GPT(GPTConfig(vocab=s.vocab, layers=s.layers, width=s.width, tokens=s.tokens)),
    "hf-gpt2": _gpt2,
}
GOALS = {512: 7, LARGE: 9}  # H above the gradients, by vocabulary


def made(make: Make, sizes: Sizes) -> nn.Module:
    """A model from seed 0, of which nothing is compiled yet."""
    torch._dynamo.reset()
    memo_compile.reset()
    torch.manual_seed(0)
    return make(sizes)


def gradients(model: nn.Module) -> int:
    """Bytes of the gradients of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


# Losses


def states(model: Any, ids: Tensor) -> Tensor:
    """What the head reads: (tokens, width)."""
    if hasattr(model, "base_model"):
        result: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return result.flatten(0, 1)
    return _hidden(model, ids, lambda block, *args: block(*args)).flatten(0, 1)


def head_weight(model: Any) -> Tensor:
    """(vocabulary, width)."""
    head: Any = model.get_output_embeddings() if hasattr(model, "base_model") else model.head
    weight: Tensor = head.weight
    return weight


def whole(model: nn.Module) -> Callable[..., Tensor]:
    """The loss of all logits at once."""

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(states(model, ids) @ head_weight(model).t(), shifted(labels))

    return loss


def _after(loss: Callable[..., Tensor], model: nn.Module, compiled: bool = True) -> Callable[..., Tensor]:
    """A loss in eager after the layers."""
    body = torch.compile(partial(states, model), backend="inductor") if compiled else partial(states, model)
    return lambda ids, labels: loss(body(ids), head_weight(model), shifted(labels))


def _by_hand(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    result: Tensor = _TiledLoss.apply(rows, weight, labels, 4 * rows.shape[0] * weight.shape[0] // CHUNKS)
    return result


def _fused_by_torch(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(rows, weight, labels, ignore_index=-100, options=options)


def losses(sizes: Sizes) -> Iterator[tuple[str, Callable[[nn.Module], Callable[..., Any]]]]:
    """Names of losses, and what makes a model's step of each."""
    yield "memo, min", lambda m: torch.compile(whole(m), backend="memo", options=MIN)
    if hasattr(F, "linear_cross_entropy"):
        yield "torch's linear_cross_entropy", partial(_after, _fused_by_torch)
    yield f"{CHUNKS} chunks by hand", partial(_after, _by_hand)
    if hasattr(torch._inductor.config, "auto_chunker"):
        for chunks in (None, CHUNKS):
            options = {"auto_chunker.enable": True, "auto_chunker.num_chunk": chunks}
            name = "Inductor's auto_chunker" + (f", {chunks} chunks" if chunks else "")
            yield name, lambda m, options=options: torch.compile(whole(m), backend="inductor", options=options)
    yield "whole, Inductor", lambda m: torch.compile(whole(m), backend="inductor")
    options = {**MIN, "offload": False}
    yield "memo, min without offloading", lambda m: torch.compile(whole(m), backend="memo", options=options)


def loss_rows() -> Iterator[Row]:
    """A row a loss."""
    sizes = Sizes(LARGE, 2, 256, 2048)
    for name, step in losses(sizes):
        model = made(FLOORS["llama"], sizes)
        yield {"part": "losses", "side": name, "gradients": gradients(model), **_measured(model, step(model), sizes)}


# Hugging Face's models


def model_rows(names: Iterable[str]) -> Iterator[Row]:
    """A row a model."""
    sizes = Sizes(LARGE, 2, 128, 1024)
    for name in names:
        found = {}
        for how, options in (("inductor", None), ("memo", MIN)):
            model = memo_compile.loss_only(made(MODELS[name], sizes))
            step = torch.compile(partial(_own_loss, model), backend=how, options=options)
            found[how] = _measured(model, step, sizes)
        yield {
            "part": "models",
            "model": name,
            "gradients": gradients(model),
            **found["memo"],
            "beside": found["inductor"],
        }


def _own_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    return loss


# Floors


def floor_rows(names: Iterable[str]) -> Iterator[Row]:
    """A row a model and vocabulary."""
    for name in names:
        for vocab in GOALS:
            sizes = Sizes(vocab, 8, 256, 2048)
            model = made(FLOORS[name], sizes)
            beside = _measured(model, _after(_by_hand, checkpointed(model), compiled=False), sizes)
            row = {"part": "floors", "model": name, "vocab": vocab, "h": sizes.h, "gradients": gradients(model)}
            for how, options in (("min", MIN), ("as the peer", {"memory_budget": int(beside["peak"])})):
                model = made(FLOORS[name], sizes)
                step = torch.compile(whole(model), backend="memo", options=options)
                yield {**row, "how": how, **_measured(model, step, sizes), "beside": beside}


def _measured(model: nn.Module, step: Callable[..., Any], sizes: Sizes) -> Row:
    return {**measured(model, step, sizes.ids), "load": os.getloadavg()[0]}


# Tables


def _mib(count: float) -> str:
    return f"{count / MIB:.1f}"


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(head: tuple[str, ...], lines: Iterable[Iterable[Any]]) -> str:
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, lines)])


def _ms(row: Row) -> str:
    """Of the fastest step; in brackets where others had the processor too, so that it says little."""
    text = f"{1000 * row['step_seconds']:.0f}"
    return text if row["load"] <= (os.cpu_count() or 1) else f"({text})"


def loss_table(rows: list[Row]) -> str:
    """Peaks and times of one model, by loss."""
    cells = [(r["side"], _mib(r["peak"]), _mib(r["peak"] - r["gradients"]), _ms(r), f"{r['loss']:.5f}") for r in rows]
    return _table(("loss", "peak MiB", "without gradients", "step ms", "value"), cells)


def model_table(rows: list[Row]) -> str:
    """Peaks against the goal."""
    cells = []
    for r in rows:
        goal = r["gradients"] + SHARE * r["beside"]["peak"]
        kept = "yes" if r["peak"] <= goal else "no"
        peaks = (r["gradients"], r["beside"]["peak"], r["peak"], goal)
        cells.append((r["model"], *map(_mib, peaks), kept, _ms(r["beside"]), _ms(r)))
    head = ("gradients MiB", "Inductor MiB", 'memo "min" MiB', "at most", "", "Inductor ms", "memo ms")
    return _table(("model", *head), cells)


def floor_table(rows: list[Row]) -> str:
    """Units H above the gradients against the goal, and beside the peer."""
    cells = []
    for r in rows:
        above, goal = (r["peak"] - r["gradients"]) / r["h"], GOALS[r["vocab"]]
        meant = f"{goal}: {'yes' if above <= goal else 'no'}" if r["how"] == "min" else ""
        peer = r["beside"]
        sides = (_mib(peer["peak"]), _ms(peer), _mib(r["peak"]), _ms(r))
        cells.append((r["model"], r["vocab"], r["how"], _mib(r["gradients"]), *sides, f"{above:.1f}", meant))
    head = (
        "model",
        "words",
        "memo's budget",
        "gradients MiB",
        "peer MiB",
        "peer ms",
        "memo MiB",
        "memo ms",
        "H above",
        "at most",
    )
    return _table(head, cells)


TABLES = {
    "losses": (f"## One loss after the other\n\nLlama, 2 layers, width 256, 2 048 tokens, {LARGE} words", loss_table),
    "models": (f"## Hugging Face's models\n\n2 layers, width 128, 1 024 tokens, {LARGE} words", model_table),
    "floors": ("## Eight layers\n\nWidth 256, 2 048 tokens; H is 2 MiB", floor_table),
}


def page(rows: list[Row]) -> str:
    """All tables of which there are rows."""
    parts = [(title, table([r for r in rows if r["part"] == part])) for part, (title, table) in TABLES.items()]
    text = "\n\n".join(f"{title}\n\n{table}" for title, table in parts if table.count("\n") > 1)
    told = "Milliseconds in brackets are of a machine that others kept busy. What has no row or table has not been run."
    return f"{told}\n\n{text}"


def main() -> None:
    """Run and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--models", nargs="+", default=[*MODELS, *FLOORS])
    parser.add_argument("--name", default="tiles")
    arguments = parser.parse_args()
    import torch._inductor.config as inductor_config

    inductor_config.force_disable_caches = True
    make: dict[str, Callable[[], Iterator[Row]]] = {
        "losses": loss_rows,
        "models": lambda: model_rows([m for m in MODELS if m in arguments.models]),
        "floors": lambda: floor_rows([m for m in FLOORS if m in arguments.models]),
    }
    path = RESULTS / f"{arguments.name}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for part in arguments.parts:
        for row in make[part]():
            print(TABLES[part][1]([row]).splitlines()[-1], flush=True)
            rows = [r for r in rows if _key(r) != _key(row)] + [row]
            rows.sort(key=lambda r: list(TABLES).index(r["part"]))
            save(arguments.name, "python -m bench.tiles", rows, page(rows))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in ("part", "side", "model", "vocab", "how"))


if __name__ == "__main__":
    main()
