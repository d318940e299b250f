"""The reference Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; `ffn` is the width between the two halves of the MLP."""

    vocab: int = 512
    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 688
    theta: float = 10000.0


class RMSNorm(nn.Module):
    """Divides each row by its root mean square."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotary_tables(tokens: int, head: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, each (tokens, head)."""
    steps = torch.arange(0, head, 2, device=like.device, dtype=torch.float64)
    angles = torch.outer(torch.arange(tokens, device=like.device, dtype=torch.float64), theta ** (-steps / head))
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features of (batch, heads, tokens, head) by the angles of their positions."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which groups of query heads share keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head = config.width // config.heads
        self.query = nn.Linear(config.width, config.heads * self.head, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * self.head, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * self.head, bias=False)
        self.out = nn.Linear(config.heads * self.head, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        batch, tokens, width = x.shape
        q = rotate(self.query(x).view(batch, tokens, self.heads, self.head).transpose(1, 2), cos, sin)
        k = rotate(self.key(x).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        v = self.value(x).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return result


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class Llama(nn.Module):
    """A causal language model. With `labels` the forward returns the mean loss, else the logits."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.apply(_initialize)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens, labels: (batch, tokens) int64. The loss predicts labels[:, i + 1] from tokens up to i."""
        x = self.embedding(tokens)
        cos, sin = rotary_tables(tokens.shape[1], self.config.width // self.config.heads, self.config.theta, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten())


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
