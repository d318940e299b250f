"""What one moment of Llama-8B's step holds at the least, and how long a sequence it can be trained on with LoRA.

    python -m bench.floor [--tokens 65536 262144 1048576] [--parts moments lora]

Nothing is emitted or run: torch without CUDA traces no model of CUDA's kernels. The figures are those of the plan's
model, of graphs in bfloat16 whose attention is the CPU's kernel, in groups of heads and in place. H is one
(tokens × 4096) tensor, 8 KiB a token; gradients of weights that are there are left out.

* moments: four layers of Llama-8B, trained whole, at "min".
* lora: all 32 layers with adapters of rank 16 on every linear layer of a block, frozen parameters in bfloat16, on one
  H200. Four and six layers are planned at "min"; host memory and seconds of the others are those of two more layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

import bench.common as common
from bench.models import RANK
from bench.tiles import _line, _table
from memo_compile.forecast.forecast import MARGIN
from memo_compile.forecast.presets import build, fake_tensors, preset
from memo_compile.hardware.profiles import resolve
from memo_compile.models.llama import Block
from memo_compile.passes.analysis.costs import is_attention
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.fx.facts import nbytes, storage_of
from memo_compile.passes.transforms.tiles import program_in
from memo_compile.planning.decide import Decided, decide
from memo_compile.planning.fit_budget import fit_budget
from memo_compile.trace.offline import trace
from memo_compile.trace.setting import limits_for

NAME, WIDTH, LAYERS = "llama-8b", 4096, 32
HARDWARE = "h200"
TRACED = (4, 6)  # layers
ADAM = 16  # bytes a trained parameter: itself, its gradient, a master copy and two moments
HOSTS = (int(1.9 * 2**40), 128 * 2**30)
PROBE, TRIES, STEP = 2**20, 5, 4096  # tokens
PEER = "ALST: 1.2 million tokens, Llama-8B on one H200"
MOMENTS = ("attention", "between attentions", "loss", "all else")
Row = dict[str, Any]


class Adapted(nn.Module):
    """A frozen linear layer and an adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def planned(tokens: int, layers: int, *, lora: bool, host: int | None = None) -> tuple[Decided, Row]:
    """The plan that holds least, and what is said of it."""
    made = build(NAME, tokens, layers=layers)
    if lora:
        with fake_tensors(torch.bfloat16):
            made.model.requires_grad_(False)
            for block in made.model.blocks:
                _adapt(block)
    options = {"memory_budget": "min", "hardware": HARDWARE, **({"host_budget": host} if host else {})}
    p, setting = trace(made.model, made.args, made.kwargs, options)
    limits = limits_for(setting, p.unplanned_peak)
    make = partial(decide, p, name=NAME, backend="memo")
    found = fit_budget(p, limits, make, lambda d: (d.plan.predicted_peak, None)).decided
    row = {
        "tokens": tokens,
        "layers": layers,
        "peak": found.plan.predicted_peak,
        "seconds": found.plan.predicted_seconds,
        "host": found.plan.host_bytes,
        "tiles": found.limits.tiles if found.limits is not None else 1,
        "trained": sum(q.numel() for q in made.model.parameters() if q.requires_grad),
    }
    return found, row


def _adapt(block: Block) -> None:
    for part in (block.attention, block.mlp):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, Adapted(layer))


# Moments


def moments(found: Decided, tokens: int) -> Row:
    """H of the widest moment of each kind, forward and backward."""
    h = 2 * WIDTH * tokens
    vocab = -(-preset(NAME).vocab // 128) * 128
    row: Row = {}
    for side, gm in (("forward", found.forward), ("backward", found.backward)):
        live = lifetimes(gm, fused=True, owned_inputs=frozenset(found.saved)).live_bytes()
        gradients = _gradients(gm) if side == "backward" else [0] * len(live)
        for node, held, beside in zip(gm.graph.nodes, live, gradients, strict=True):
            key = f"{_moment(node, vocab)}, {side}"
            row[key] = max(row.get(key, 0.0), (held - beside) / h)
    return row


def _moment(node: fx.Node, vocab: int) -> str:
    if is_attention(node):
        return MOMENTS[0]
    if program_in(node) is None:
        return MOMENTS[3]
    read: Any = node.args[1]
    return MOMENTS[2] if any(vocab in n.meta["val"].shape for n in read) else MOMENTS[1]


def _gradients(gm: fx.GraphModule) -> list[int]:
    """At each node, the bytes of results that are there."""
    (output,) = gm.graph.find_nodes(op="output")
    results = {storage_of(n) for n in output.args[0] if isinstance(n, fx.Node)}
    found, held = [], 0
    for node in gm.graph.nodes:
        held += nbytes(node) if node in results and node.op == "call_function" else 0
        found.append(held)
    return found


def moment_rows(lengths: list[int]) -> Iterator[Row]:
    """A row a length."""
    for tokens in lengths:
        found, row = planned(tokens, TRACED[0], lora=False, host=HOSTS[0])
        yield {"part": "moments", **row, "moments": moments(found, tokens)}


# LoRA


def lora_rows() -> Iterator[Row]:
    """A row for each size of host memory: the longest length that the model says fits."""
    for host in HOSTS:
        yield _longest(host)


def _longest(host: int) -> Row:
    """The longest of the lengths tried: peaks grow with the tokens, but for what does not, and is tried again."""
    shares = [host * layers // LAYERS for layers in TRACED]
    tokens, fitting = PROBE, dict[int, Row]()
    for _ in range(TRIES):
        row = planned(tokens, TRACED[0], lora=True, host=shares[0])[1]
        room = _room(row)
        if row["peak"] <= room:
            fitting[tokens] = row
        tokens = int(tokens * room / row["peak"] / STEP) * STEP
        if tokens in fitting:
            break
    tokens = max(fitting)
    at_length = [fitting[tokens], planned(tokens, TRACED[1], lora=True, host=shares[1])[1]]
    more = (at_length[1]["seconds"] - at_length[0]["seconds"]) / (TRACED[1] - TRACED[0])
    return {
        "part": "lora",
        "host_memory": host,
        "room": room,
        **at_length[0],
        "all_seconds": at_length[0]["seconds"] + more * (LAYERS - TRACED[0]),
        "all_host": at_length[0]["host"] * LAYERS // TRACED[0],
        "h": at_length[0]["peak"] / (2 * WIDTH * tokens),
    }


def _room(row: Row) -> int:
    """Bytes of the device for activations: beside frozen parameters, adapters and what Adam holds of them."""
    found = preset(NAME)
    trained = row["trained"] * LAYERS // TRACED[0]
    return int(resolve(HARDWARE).memory * (1 - MARGIN)) - 2 * found.parameters - ADAM * trained


# The page


def page(rows: list[Row]) -> str:
    """Both tables."""
    told = (
        "By the plan's model: nothing was emitted for CUDA, nothing was run. Graphs are traced in bfloat16 with the "
        "CPU's attention, in groups of heads and in place. CUDA's kernels make their results beside what they read, "
        "and the H200's flash backward sums in float32: attention's backward is about 5 H wider there (dq, dk, dv of "
        "repeated heads 3, sums 2). H is one (tokens × 4096) tensor, 8 KiB a token; gradients of weights are left out. "
        "What has no row has not been run."
    )
    tables = {"moments": _moment_table, "lora": _lora_table}
    return "\n\n".join([told, *(tables[part](rows) for part in tables if any(r["part"] == part for r in rows))])


def _moment_table(rows: list[Row]) -> str:
    found = [r for r in rows if r["part"] == "moments"]
    keys = list(dict.fromkeys(key for r in found for key in r["moments"]))
    lines = [(key, *(f"{r['moments'].get(key, 0):.1f}" for r in found)) for key in sorted(keys)]
    lines.append(("tiles", *(r["tiles"] for r in found)))
    head = ("moment, in H", *(f"{r['tokens']:,} tokens" for r in found))
    return f'## Llama-8B\'s shapes, {TRACED[0]} layers, at "min"\n\n{_table(head, lines)}'


def _lora_table(rows: list[Row]) -> str:
    lines = [
        (
            f"{r['host_memory'] / 2**30:,.0f}",
            f"{r['room'] / 2**30:.1f}",
            f"{r['tokens']:,}",
            f"{r['peak'] / 2**30:.1f}",
            f"{r['h']:.1f}",
            f"{r['all_host'] / 2**30:,.0f}",
            f"{r['all_seconds']:,.0f}",
        )
        for r in rows
        if r["part"] == "lora"
    ]
    head = ("host GiB", "room GiB", "longest", "held GiB", "H", "on the host GiB", "step s")
    return f"## LoRA, {LAYERS} layers, one H200\n\nBeside it: {PEER}.\n\n{_table(head, lines)}"


def main() -> None:
    """Plan and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**16, 2**18, 2**20])
    parser.add_argument("--parts", nargs="+", default=["moments", "lora"], choices=["moments", "lora"])
    arguments = parser.parse_args()
    path = common.RESULTS / "floor.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [r for r in rows if r["part"] not in arguments.parts]
    for part in arguments.parts:
        for row in moment_rows(arguments.tokens) if part == "moments" else lora_rows():
            print(_line(row.items()), flush=True)
            rows.append(row)
            common.save("floor", "python -m bench.floor", rows, page(rows))


if __name__ == "__main__":
    main()
