"""A program's model and inputs, in float64, from its seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.fuzzing.layers import KINDS, WRAPPERS
from bench.fuzzing.programs import Layer, Program

CLASSES = 32


def _module(layer: Layer, width: int, tokens: int) -> nn.Module:
    kind = KINDS[layer.kind]
    if layer.kind not in WRAPPERS:
        return kind.make(width, tokens, **layer.chosen)
    inner = nn.Sequential(*(_module(each, width, tokens) for each in layer.inner))
    return kind.make(width, tokens, inner=inner, **layer.chosen)


class Model(nn.Module):
    """The layers between what comes in and a loss."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        shape = program.shape
        width, tokens = shape["width"], shape["tokens"]
        self.shape = dict(shape)
        self.start = nn.Embedding(CLASSES, width) if shape["start"] == "embedding" else None
        self.blocks = nn.ModuleList(_module(layer, width, tokens) for layer in program.layers)
        if shape["alike"]:
            self.blocks.extend(_module(layer, width, tokens) for layer in program.layers)
        self.head = nn.Linear(width, CLASSES) if shape["loss"] != "squares" or shape["outputs"] != "loss" else None
        if shape["tied"] and self.start is not None and self.head is not None:
            self.head.weight = self.start.weight
        self._freeze(shape["frozen"])

    def _freeze(self, which: str) -> None:
        last = len(self.blocks) - 1
        frozen = {"none": (), "first": (0,), "last": (last,), "all but one": range(last)}[which]
        for i in frozen:
            self.blocks[i].requires_grad_(False)

    def forward(self, given: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = given if self.start is None else self.start(given)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x) if self.head is not None else x
        loss = _LOSSES[self.shape["loss"]](logits, labels)
        beside = {
            "loss": (),
            "loss and hidden": (x,),
            "loss and logits": (logits,),
            "loss and view": (x.mT[:, 1:], x.detach().sum(-1)),
        }[self.shape["outputs"]]
        return (loss, *beside)


def _in_parts(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    parts = zip(logits.split(48, 1), labels.split(48, 1), strict=True)
    total = [F.cross_entropy(a.flatten(0, 1), b.flatten(), reduction="sum") for a, b in parts]
    return torch.stack(total).sum() / labels.numel()


def _divergence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    aim = F.one_hot(labels, logits.shape[-1]).to(logits.dtype).softmax(-1)
    return F.kl_div(logits.log_softmax(-1), aim, reduction="batchmean") / labels.shape[1]


_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "squares": lambda x, labels: x.square().mean(),
    "classes": lambda x, labels: F.cross_entropy(x.flatten(0, 1), labels.flatten()),
    "classes in parts": _in_parts,
    "sum of classes": lambda x, labels: F.cross_entropy(x.mT, labels, reduction="sum", label_smoothing=0.1),
    "ignored classes": lambda x, labels: F.cross_entropy(x.mT, labels.masked_fill(labels < 4, -100)),
    "weighted": lambda x, labels: (F.cross_entropy(x.mT, labels, reduction="none") * (labels + 1)).sum() / labels.sum(),
    "divergence": _divergence,
}


@dataclass(frozen=True)
class Made:
    """A model with two batches."""

    model: nn.Module
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]]


def make(program: Program, device: torch.device) -> Made:
    """The same model and batches at every call."""
    torch.manual_seed(program.seed)
    shape = program.shape
    model = Model(program).double().train()
    size = (shape["batch"], shape["tokens"])
    batches = []
    for _ in range(2):
        given: Any = torch.randint(0, CLASSES, size)
        if shape["start"] != "embedding":
            given = torch.randn(*size, shape["width"], dtype=torch.float64)
        batches.append((given.to(device), torch.randint(0, CLASSES if model.head is not None else 2, size).to(device)))
    return Made(model.to(device), batches)
