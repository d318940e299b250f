"""The reference Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memo_compile.models.parallel import WHOLE, Shard, columns, embed, next_token_loss, rows


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; `ffn` is the width between the two halves of the MLP, `tied` shares embedding and head.

    `shard` says which share of heads, features and vocabulary one rank of a tensor-parallel group holds.
    """

    vocab: int = 512
    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 688
    theta: float = 10000.0
    tied: bool = False
    shard: Shard = WHOLE


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
        self.shard = config.shard
        self.heads, self.kv_heads = config.heads // self.shard.ranks, config.kv_heads // self.shard.ranks
        self.head = config.width // config.heads
        self.query = nn.Linear(config.width, self.heads * self.head, bias=False)
        self.key = nn.Linear(config.width, self.kv_heads * self.head, bias=False)
        self.value = nn.Linear(config.width, self.kv_heads * self.head, bias=False)
        self.out = nn.Linear(self.heads * self.head, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens / ranks, width) -> the same."""
        q, k, v = columns(x, (self.query, self.key, self.value), self.shard)
        batch, tokens, width = q.shape
        q = rotate(q.view(batch, tokens, self.heads, self.head).transpose(1, 2), cos, sin)
        k = rotate(k.view(batch, tokens, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        v = v.view(batch, tokens, self.kv_heads, self.head).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return rows(mixed.transpose(1, 2).reshape(batch, tokens, width), self.out, self.shard)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.shard = config.shard
        share = config.ffn // self.shard.ranks
        self.gate = nn.Linear(config.width, share, bias=False)
        self.up = nn.Linear(config.width, share, bias=False)
        self.down = nn.Linear(share, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens / ranks, width) -> the same."""
        gate, up = columns(x, (self.gate, self.up), self.shard)
        return rows(F.silu(gate) * up, self.down, self.shard)


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens / ranks, width) -> the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class Llama(nn.Module):
    """A causal language model. With `labels` the forward returns the mean loss, else the logits."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        share = config.vocab // config.shard.ranks
        self.embedding = nn.Embedding(share, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, share, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.apply(_initialize)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens, labels: (batch, tokens / ranks) int64. The loss predicts labels[:, i + 1] from tokens up to i."""
        shard = self.config.shard
        x = embed(tokens, self.embedding, shard)
        everyone = tokens.shape[1] * shard.ranks
        cos, sin = rotary_tables(everyone, self.config.width // self.config.heads, self.config.theta, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        if labels is None:
            (logits,) = columns(x, (self.head,), shard)
            return logits
        return next_token_loss(x, labels, self.head, shard)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
