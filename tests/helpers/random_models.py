"""Models drawn from a seed, of what transformers and their kin are made of, and options to plan them with.

Small, in float64, training; large enough for every activation to be worth moving.
"""

from __future__ import annotations

import random

import torch
import torch.nn as nn
import torch.nn.functional as F

MIXERS = ("causal", "masked", "scores", "scores", "grouped", "convolution", "shift", "mean")
NORMS = ("layer", "rms", "layer", "rms", "scale", "none")
WIDENINGS = ("gelu", "tanh", "in place", "gated", "mixed")
LOSSES = ("whole", "whole", "chunked", "squares", "two")
BUDGETS = (0.85, 0.7, 0.55, 0.4, 0.3, "min", "min")
OPTIONS = (
    {},
    {},
    {"offload": False},
    {"recompute": False},
    {"offload": "all"},
    {"token_slice": 7},
    {"token_slice": 16},
    {"hardware": "h200"},
    {"hardware": "a800"},
)


class Norm(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.kind = kind
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.shift = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x):
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.gain, self.shift)
        if self.kind == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain
        return x * self.gain + self.shift if self.kind == "scale" else x


class Attention(nn.Module):
    def __init__(self, width, heads, kind, dropout):
        super().__init__()
        self.heads, self.kind, self.dropout = heads, kind, dropout
        self.groups = heads // 2 if kind == "grouped" else heads
        self.q, self.out = nn.Linear(width, width, bias=kind != "grouped"), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, width * self.groups // heads) for _ in range(2))

    def forward(self, x, mask):
        q, k, v = (
            f(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        if self.kind == "grouped":
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        if self.kind == "scores":
            scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)
            y = F.dropout(scores, self.dropout, self.training) @ v
        elif self.kind == "masked":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.filter = nn.Conv1d(width, width, 3, groups=width)

    def forward(self, x, mask):
        return self.filter(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Shift(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.share, self.out = nn.Parameter(torch.rand(width)), nn.Linear(width, width)

    def forward(self, x, mask):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return self.out(x * self.share + before * (1 - self.share))


class Mean(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x, mask):
        return self.out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None])


class Widening(nn.Module):
    def __init__(self, width, kind, factor, dropout):
        super().__init__()
        self.kind, self.dropout = kind, dropout
        self.up, self.down = nn.Linear(width, factor * width), nn.Linear(factor * width, width)
        self.gate = nn.Linear(width, factor * width, bias=False) if kind in ("gated", "mixed") else None

    def forward(self, x):
        y = self.up(x)
        if self.kind == "in place":
            y = y.relu_().square()
        elif self.kind == "gated":
            y = F.silu(self.gate(x)) * y
        elif self.kind == "mixed":
            y = y * self.gate(x).softmax(-1) + y.sigmoid()
        else:
            y = F.gelu(y, approximate="tanh" if self.kind == "tanh" else "none")
        return self.down(F.dropout(y, self.dropout, self.training))


class Block(nn.Module):
    def __init__(self, draw, width, heads, dropout):
        super().__init__()
        kind = draw.choice(MIXERS)
        others = {"convolution": Convolution, "shift": Shift, "mean": Mean}
        in_scores = draw.choice((0.0, dropout))
        self.mixer = others[kind](width) if kind in others else Attention(width, heads, kind, in_scores)
        self.norms = nn.ModuleList(Norm(width, draw.choice(NORMS)) for _ in range(2))
        self.widening = Widening(width, draw.choice(WIDENINGS), draw.choice((2, 3, 4)), draw.choice((0.0, dropout)))
        self.dropout = draw.choice((0.0, dropout))
        self.order = draw.choice(("before", "before", "before", "behind", "beside", "in place", "no residual"))

    def forward(self, x, mask):
        if self.order == "behind":
            x = self.norms[0](x + F.dropout(self.mixer(x, mask), self.dropout, self.training))
            return self.norms[1](x + F.dropout(self.widening(x), self.dropout, self.training))
        if self.order == "beside":
            return x + self.mixer(self.norms[0](x), mask) + self.widening(self.norms[1](x))
        x = x + F.dropout(self.mixer(self.norms[0](x), mask), self.dropout, self.training)
        y = self.widening(self.norms[1](x))
        if self.order == "in place":
            return y.add_(x)
        return y if self.order == "no residual" else x + y


class Model(nn.Module):
    def __init__(self, draw):
        super().__init__()
        width, heads = draw.choice((32, 48, 64)), draw.choice((2, 4))
        self.tokens, self.vocab = draw.choice((64, 96, 128, 160)), draw.choice((37, 64, 128))
        self.dropout = draw.choice((0.0, 0.0, 0.1, 0.3))
        layers, alike, one = draw.choice((2, 3, 3, 4)), draw.random() < 0.4, draw.randrange(10**9)
        self.blocks = nn.ModuleList(
            Block(random.Random(one) if alike else draw, width, heads, self.dropout) for _ in range(layers)
        )
        self.embedding, self.head = nn.Embedding(self.vocab, width), nn.Linear(width, self.vocab)
        self.norm = Norm(width, draw.choice(NORMS))
        self.positions = nn.Parameter(0.1 * torch.randn(self.tokens, width)) if draw.random() < 0.5 else None
        if draw.random() < 0.3:
            self.head.weight = self.embedding.weight
        self.loss, self.twice = draw.choice(LOSSES), draw.random() < 0.2
        self.checkpointed, self.counting = draw.random() < 0.15, draw.random() < 0.15
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, ids, labels, absent):
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions
        mask = torch.full((ids.shape[1],) * 2, -1e9, dtype=x.dtype).triu(1) - 1e4 * absent[:, None, None, :]
        if self.counting:
            self.seen.mul_(0.9).add_(x.detach().mean((0, 1)))
        first = None
        for i, block in enumerate([*self.blocks, *self.blocks[: self.twice]]):
            if self.checkpointed and i == 1:
                x = torch.utils.checkpoint.checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
            first = x if first is None else first
        x = self.norm(x)
        if self.loss == "chunked":
            parts = zip(x.split(self.tokens // 4, 1), labels.split(self.tokens // 4, 1), strict=True)
            return sum(F.cross_entropy(self.head(a).mT, b, reduction="sum") for a, b in parts) / labels.numel()
        logits = self.head(x)
        if self.loss == "squares":
            return (logits - F.one_hot(labels, self.vocab)).square().mean()
        loss = F.cross_entropy(logits.mT, labels)
        return loss + first.square().mean() if self.loss == "two" else loss


def model_of(seed):
    """Model and inputs."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Model(draw).double().train()
    size = (draw.choice((1, 1, 2, 3)), model.tokens)
    absent = (torch.rand(size) < 0.1).double()
    absent[:, 0] = 0
    return model, (torch.randint(0, model.vocab, size), torch.randint(0, model.vocab, size), absent)


def options_of(seed):
    """Options, and the seconds that the slowest of its copies is held up by."""
    draw = random.Random(-1 - seed)
    return {"memory_budget": draw.choice(BUDGETS), **draw.choice(OPTIONS)}, draw.choice((0, 0, 0.002, 0.02))
