"""The reference GPT, as in the paper: LayerNorm, GeLU, multi-head attention, learned positions, dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memo_compile.models.parallel import WHOLE, Shard, columns, embed, next_token_loss, rows


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the MLP is four times as wide as the residual stream. Without `tokens` it learns no positions.

    `shard` says which share of heads, features and vocabulary one rank of a tensor-parallel group holds.
    """

    vocab: int = 512
    layers: int = 4
    width: int = 256
    heads: int = 8
    tokens: int = 2048
    dropout: float = 0.0
    shard: Shard = WHOLE


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, self.shard = config.width, config.shard
        share = width // self.shard.ranks
        self.heads, self.dropout = config.heads // self.shard.ranks, config.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * share), nn.Linear(share, width)
        self.wide, self.narrow = nn.Linear(width, 4 * share), nn.Linear(4 * share, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens / ranks, width) -> the same."""
        (qkv,) = columns(self.attention_norm(x), (self.qkv,), self.shard)
        batch, tokens, features = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = rows(mixed.transpose(1, 2).reshape(batch, tokens, features // 3), self.out, self.shard)
        x = x + F.dropout(attended, self.dropout, self.training)
        (wide,) = columns(self.mlp_norm(x), (self.wide,), self.shard)
        hidden = rows(F.gelu(wide), self.narrow, self.shard)
        return x + F.dropout(hidden, self.dropout, self.training)


class GPT(nn.Module):
    """A causal language model. With `labels` the forward returns the mean loss, else the logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        share = config.vocab // config.shard.ranks
        self.embedding = nn.Embedding(share, config.width)
        self.positions = nn.Embedding(config.tokens // config.shard.ranks, config.width) if config.tokens else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, share, bias=False)
        self.head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens, labels: (batch, tokens / ranks) int64. The loss predicts labels[:, i + 1] from tokens up to i."""
        x = embed(tokens, self.embedding, self.config.shard)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if labels is None:
            (logits,) = columns(x, (self.head,), self.config.shard)
            return logits
        return next_token_loss(x, labels, self.head, self.config.shard)
