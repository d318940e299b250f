"""Tensor parallelism with sequence parallelism, as in Megatron-LM (arXiv 2205.05198): one rank's share of a model.

Between the parallel regions a rank holds its share of the tokens, (batch, tokens / ranks, width); inside them all
tokens and its share of heads, features or vocabulary. Gathered inputs are not saved but gathered again in the backward.
With one rank these functions are plain linear layers.

Gradients of what every rank holds whole (norms, biases after a sum over ranks) are sums over the rank's own tokens:
the training loop adds them up over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memo_compile.models.collectives import all_gather, all_reduce, reduce_scatter

TOKENS = 1  # the dimension of (batch, tokens, width) that is shared out between the regions


@dataclass(frozen=True)
class Shard:
    """Which share of a model this is: `rank` of `ranks` in the process group named `group` ("": the default one)."""

    ranks: int = 1
    rank: int = 0
    group: str = ""


WHOLE = Shard()


class _Columns(torch.autograd.Function):
    """Gather the tokens once, and multiply with several weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        ctx.save_for_backward(x, *weights)
        rows = all_gather(x, TOKENS, shard.ranks, shard.group)
        return tuple(F.linear(rows, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        rows = all_gather(x, TOKENS, ctx.shard.ranks, ctx.shard.group, gradients[0]).flatten(0, 1)
        of_weights = [g.flatten(0, 1).t() @ rows for g in gradients]
        of_rows = sum(g @ w for g, w in zip(gradients[1:], weights[1:], strict=True)) + gradients[0] @ weights[0]
        return reduce_scatter(of_rows, TOKENS, ctx.shard.ranks, ctx.shard.group), None, *of_weights


class _SumOfRanks(torch.autograd.Function):
    """Sum partial results over the ranks, and share the tokens out."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return reduce_scatter(partial, TOKENS, shard.ranks, shard.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_gather(gradient, TOKENS, ctx.shard.ranks, ctx.shard.group), None


class _CrossEntropy(torch.autograd.Function):
    """-log softmax of each row at its target, from this rank's logits alone and two sums over the ranks.

    Saves the logits and one number a row: probabilities are recomputed from them. logits: (batch, tokens, vocabulary /
    ranks), targets: (batch, tokens, 1), numbered from this rank's first word.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shard: Shard) -> Tensor:
        wide = logits.float()
        largest = all_reduce(wide.amax(-1, keepdim=True), "max", shard.ranks, shard.group)
        total = all_reduce((wide - largest).exp().sum(-1, keepdim=True), "sum", shard.ranks, shard.group)
        hit = torch.where(_words(logits) == targets, wide, 0.0).sum(-1, keepdim=True)
        log_total = largest + total.log()
        ctx.save_for_backward(logits, targets, log_total)
        return log_total - all_reduce(hit, "sum", shard.ranks, shard.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, targets, log_total = ctx.saved_tensors
        difference = (logits.float() - log_total).exp() - (_words(logits) == targets).float()
        return (difference * gradient).to(logits.dtype), None, None


def _words(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[-1], device=logits.device)


def columns(x: Tensor, layers: Sequence[nn.Linear], shard: Shard) -> tuple[Tensor, ...]:
    """`x` through layers whose output features are shared out: (batch, tokens / ranks, in) -> (batch, tokens, out)."""
    if shard.ranks == 1:
        return tuple(layer(x) for layer in layers)
    results = _Columns.apply(x, shard, *(layer.weight for layer in layers))
    return tuple(r if layer.bias is None else r + layer.bias for r, layer in zip(results, layers, strict=True))


def rows(x: Tensor, layer: nn.Linear, shard: Shard) -> Tensor:
    """`x` through a layer whose input features are shared out: (batch, tokens, in) -> (batch, tokens / ranks, out)."""
    if shard.ranks == 1:
        result: Tensor = layer(x)
        return result
    summed: Tensor = _SumOfRanks.apply(F.linear(x, layer.weight), shard)
    return summed if layer.bias is None else summed + layer.bias


def embed(tokens: Tensor, table: nn.Embedding, shard: Shard) -> Tensor:
    """Look up (batch, tokens / ranks) in a table whose rows are shared out: -> (batch, tokens / ranks, width)."""
    if shard.ranks == 1:
        looked_up: Tensor = table(tokens)
        return looked_up
    own = all_gather(tokens, TOKENS, shard.ranks, shard.group) - shard.rank * table.num_embeddings
    inside = (own >= 0) & (own < table.num_embeddings)
    partial = table(own.clamp(0, table.num_embeddings - 1)) * inside.unsqueeze(-1)
    result: Tensor = _SumOfRanks.apply(partial, shard)
    return result


def next_token_loss(x: Tensor, labels: Tensor, head: nn.Linear, shard: Shard) -> Tensor:
    """The mean cross-entropy of predicting labels[:, i + 1] at i, the vocabulary shared out.

    x: (batch, tokens / ranks, width), labels: (batch, tokens / ranks). After Megatron's: sums over the vocabulary are
    sums over ranks, and no rank sees all logits.
    """
    if shard.ranks == 1:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        return F.cross_entropy(head(x).flatten(0, 1), targets)
    (logits,) = columns(x, (head,), shard)
    everyone = all_gather(labels, TOKENS, shard.ranks, shard.group)
    targets = F.pad(everyone[:, 1:], (0, 1), value=-100).unsqueeze(-1)
    first = shard.rank * head.out_features
    losses: Tensor = _CrossEntropy.apply(logits, targets - first, shard)
    wanted = targets != -100
    return torch.where(wanted, losses, 0.0).sum() / wanted.sum()
