"""The kinds of layers: each a module from (batch, tokens, width) to the same, and what can be chosen of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.fuzzing.attention import ATTENTION, Attention
from bench.fuzzing.special import SPECIAL, WRAPPING

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu in place": lambda x: F.relu_(x).square(),
    "silu": F.silu,
    "softmax": lambda x: x.softmax(-1),
    "sine": torch.sin,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "clamp": lambda x: x.clamp(-0.7, 0.9),
}


@dataclass(frozen=True)
class Kind:
    """A kind of layer: `make(width, tokens, **chosen)`."""

    make: Callable[..., nn.Module]
    choices: Mapping[str, tuple[Any, ...]]


class Linear(nn.Module):
    """A linear layer, an activation, and what is added."""

    def __init__(self, width: int, tokens: int, activation: str, bias: bool, residual: bool, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)
        self.activation, self.residual, self.dropout = activation, residual, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(ACTIVATIONS[self.activation](self.linear(x)), self.dropout)
        return x + y if self.residual else y


class Mlp(nn.Module):
    """A widening, gated or not, and back."""

    def __init__(self, width: int, tokens: int, activation: str, gate: str, factor: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, factor * width), nn.Linear(factor * width, width)
        self.gate = nn.Linear(width, factor * width, bias=False) if gate != "none" else None
        self.kind, self.activation, self.dropout = gate, activation, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ACTIVATIONS[self.activation](self.up(x))
        if self.gate is not None:
            other = self.gate(x)
            y = y * other if self.kind == "product" else y * other.sigmoid() + other
        return x + self.down(F.dropout(y, self.dropout))


class Norm(nn.Module):
    """A norm over the width, or of batches and groups."""

    def __init__(self, width: int, tokens: int, how: str, affine: bool) -> None:
        super().__init__()
        self.how = how
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(width)) if affine else None
        self.shift = nn.Parameter(0.1 * torch.randn(width)) if affine else None
        self.batch = nn.BatchNorm1d(width) if how == "batch" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.batch is not None:
            return self.batch(x.transpose(1, 2)).transpose(1, 2)
        if self.how == "layer":
            return F.layer_norm(x, x.shape[-1:], self.gain, self.shift)
        if self.how == "group":
            return F.group_norm(x.transpose(1, 2), 2, self.gain, self.shift).transpose(1, 2)
        if self.how == "fused rms":
            return F.rms_norm(x, x.shape[-1:], self.gain)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y if self.gain is None or self.shift is None else y * self.gain + self.shift


class Convolution(nn.Module):
    """Over the tokens, or over an image that they are cut into."""

    def __init__(self, width: int, tokens: int, how: str, pool: str) -> None:
        super().__init__()
        self.how, self.pool = how, pool
        groups = width if how == "depthwise" else 1
        self.filter = (
            nn.Conv2d(width, width, 3, padding=1)
            if how == "image"
            else nn.Conv1d(width, width, 3, groups=groups, padding=0 if how == "causal" else 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2)
        if self.how == "image":
            y = self.filter(y.unflatten(2, (8, -1))).flatten(2)
        else:
            y = self.filter(F.pad(y, (2, 0)) if self.how == "causal" else y)
        if self.pool == "max":
            y = F.max_pool1d(y, 3, 1, 1)
        elif self.pool == "mean":
            y = F.interpolate(F.avg_pool1d(y, 2), scale_factor=2)
        return x + y.transpose(1, 2)


class Views(nn.Module):
    """Views of views, and what copies rows about."""

    def __init__(self, width: int, tokens: int, how: str) -> None:
        super().__init__()
        self.how, self.gain = how, nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.gain
        return _VIEWS[self.how](y).tanh() + x


_VIEWS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda y: y.unflatten(-1, (2, -1)).transpose(1, 2).flip(1).transpose(1, 2).flatten(2),
    "halves": lambda y: torch.cat(y.chunk(2, -1)[::-1], -1),
    "rows": lambda y: torch.cat([y[:, 1:], y[:, :1] * 2], 1),
    "rolled": lambda y: y.roll(3, 1),
    "strided": lambda y: y.as_strided(y.shape, (y.stride(0), y.stride(1), y.stride(2))).flip(2),
    "every second": lambda y: torch.stack([y[:, ::2], y[:, 1::2]], 2).flatten(1, 2),
    "expanded": lambda y: (y.unsqueeze(2).expand(-1, -1, 3, -1).sin() * y.mean(1)[:, None, None]).sum(2),
    "windows": lambda y: F.pad(y, (0, 0, 2, 0)).unfold(1, 3, 1).sum(-1),
    "gathered": lambda y: y.gather(1, y.detach().argsort(1)),
    "best": lambda y: y * torch.zeros_like(y).scatter(1, y.detach().topk(5, 1).indices, 1.0),
    "split": lambda y: torch.cat([p.cumsum(1) / 8 for p in y.split([16, y.shape[1] - 16], 1)], 1),
    "where": lambda y: torch.where(y > y.mean(1, keepdim=True), y, y.detach().square()),
    "product": lambda y: torch.einsum("btw,bsw->bts", y, y).softmax(-1) @ y,
    "same view twice": lambda y: y.view(-1).view_as(y) + y.mT.mT.exp(),
}


class InPlace(nn.Module):
    """Ops that write to what they are given, whole or in parts."""

    def __init__(self, width: int, tokens: int, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.how == "add":
            y.add_(x.sin())
        elif self.how == "rows":
            y[:, 3:9].mul_(0.5)
        elif self.how == "copy":
            y[:, ::2] = x[:, ::2].cos()
        elif self.how == "masked":
            y.masked_fill_(x > 0.5, 0.25)
        elif self.how == "indexed":
            y[:, torch.arange(4)] += x[:, -4:]
        elif self.how == "view":
            y.view(-1, 2, y.shape[-1] // 2)[:, 1].add_(1.0)
        elif self.how == "twice":
            early = y.exp()
            y.mul_(2).tanh_()
            y = y + early.tanh()
        return y


class Running(nn.Module):
    """Buffers that the forward updates."""

    def __init__(self, width: int, tokens: int, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.mean: torch.Tensor
        self.count: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
            self.count.add_(1)
        return y - self.mean if self.how == "read" else y.tanh()


class Looked(nn.Module):
    """Embeddings of positions, and rows that are sent to experts."""

    def __init__(self, width: int, tokens: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(tokens, width)
        self.experts = nn.Parameter(torch.randn(2, width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "positions":
            return x + self.table(torch.arange(x.shape[1], device=x.device))
        if self.how == "rows":
            return x + self.table.weight[: x.shape[1]] * x.mean(-1, keepdim=True)
        weights = (x @ self.experts[0]).softmax(-1)[..., :2]
        outputs = torch.stack([x @ e for e in self.experts.unbind(0)], -1)
        return x + (outputs * weights.unsqueeze(2)).sum(-1)


DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.2)
KINDS: Mapping[str, Kind] = {
    "linear": Kind(
        Linear,
        {"activation": tuple(ACTIVATIONS), "bias": (True, False), "residual": (False, True), "dropout": DROPOUT},
    ),
    "mlp": Kind(
        Mlp,
        {"activation": tuple(ACTIVATIONS), "gate": ("none", "product", "mixed"), "factor": (2, 4), "dropout": DROPOUT},
    ),
    "norm": Kind(Norm, {"how": ("layer", "rms", "fused rms", "group"), "affine": (True, False)}),
    "batch norm": Kind(Norm, {"how": ("batch",), "affine": (True, False)}),
    "attention": Kind(Attention, ATTENTION),
    "more attention": Kind(Attention, ATTENTION),  # it is where most can go wrong
    "convolution": Kind(
        Convolution, {"how": ("plain", "causal", "depthwise", "image"), "pool": ("none", "max", "mean")}
    ),
    "views": Kind(Views, {"how": tuple(_VIEWS)}),
    "in place": Kind(InPlace, {"how": ("add", "rows", "copy", "masked", "indexed", "view", "twice")}),
    "running": Kind(Running, {"how": ("unread", "read")}),
    "looked up": Kind(Looked, {"how": ("positions", "rows", "experts")}),
    **{name: Kind(make, choices) for name, (make, choices) in {**SPECIAL, **WRAPPING}.items()},
}
WRAPPERS = frozenset(WRAPPING)
