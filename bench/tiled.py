"""Checkpointing with layer inputs on the host, a tiled MLP and a tiled loss: ALST's recipe (arXiv 2506.13996), eager.

As in DeepSpeed's `TiledMLP` and `TiledFusedLogitsLoss`: the MLP keeps its input alone and runs again, tile by tile, in
the backward, where each tile adds to the weights' gradients in place; as many tiles as tokens are longer than the model
is wide. The loss makes the logits of one tile at a time, of at most 1 GiB in float32, and both gradients with them.

And Liger's fused loss with checkpointing, where liger-kernel is installed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.models import HFTrained, blocks_of, head_of, shifted
from bench.peers import Run, _hidden, checkpointed, checkpointed_on_streams
from memo_compile.models.gpt import Block

LOGITS = 2**30  # bytes of one tile's logits in float32


class _TiledMLP(torch.autograd.Function):
    """A token-wise module, tile by tile in both directions; its parameters get their gradients in `.grad`."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, tiles: int, *parameters: Tensor) -> Tensor:
        """x: (1, tokens, width). `parameters` are the module's, so that autograd knows that a gradient is wanted."""
        ctx.module, ctx.tiles = module, tiles
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.cat([module(tile) for tile in x.chunk(tiles, dim=1)], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The gradient of x, written tile by tile into one tensor."""
        (x,) = ctx.saved_tensors
        x_gradient = torch.empty_like(x)
        pieces = (x.detach(), x_gradient, gradients[0])
        for tile, wanted, gradient in zip(*(t.chunk(ctx.tiles, dim=1) for t in pieces), strict=True):
            tile.requires_grad_()
            with torch.enable_grad():
                result = ctx.module(tile)
            torch.autograd.backward(result, gradient)
            assert tile.grad is not None
            wanted.copy_(tile.grad)
            tile.grad = None
        return (None, x_gradient, None, *(None for _ in ctx.module.parameters()))


class TiledMLP(nn.Module):
    """A token-wise module that runs tile by tile: ceil(tokens / width) tiles, as DeepSpeed chooses them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(1, tokens, width) -> the same."""
        tiles = math.ceil(x.shape[1] / x.shape[2])
        result: Tensor = _TiledMLP.apply(self.module, x, tiles, *self.module.parameters())
        return result


class _TiledLoss(torch.autograd.Function):
    """Mean cross entropy, the logits of a tile of tokens at a time; both gradients are made with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, most: int | None = None) -> Tensor:
        """hidden: (tokens, width), weight: (vocabulary, width), labels: (tokens,), -100 for none.

        `most` is bytes of one tile's logits in float32, where that is not `LOGITS`.
        """
        count = (labels >= 0).sum()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
        tiles = math.ceil(hidden.shape[0] * weight.shape[0] * 4 / (most or LOGITS))
        for rows, wanted, into in zip(*(t.chunk(tiles) for t in (hidden, labels, hidden_gradient)), strict=True):
            with torch.enable_grad():
                rows, leaf = rows.detach().requires_grad_(), weight.detach().requires_grad_()
                loss = F.cross_entropy((rows @ leaf.t()).float(), wanted, reduction="sum", ignore_index=-100) / count
            targets = (rows, leaf) if weight_gradient is not None else (rows,)
            found = torch.autograd.grad(loss, targets)
            into.copy_(found[0])
            if weight_gradient is not None:
                weight_gradient += found[1]
            total += loss.detach().float()
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Both gradients, scaled in place by what comes in."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradients[0]
        if weight_gradient is not None:
            weight_gradient.mul_(scale.to(weight_gradient.dtype))
        return hidden_gradient.mul_(scale.to(hidden_gradient.dtype)), weight_gradient, None, None


def _tile(block: Any) -> None:
    if isinstance(block, Block):
        tiled = TiledMLP(nn.Sequential(block.wide, nn.GELU(), block.narrow))
        block.forward = partial(_gpt_block, block, tiled)
    elif hasattr(block, "mlp"):
        block.mlp = TiledMLP(block.mlp)
    else:
        raise NotImplementedError("the model's layers have no module that is their MLP, and nothing can be tiled")


def _gpt_block(block: Block, mlp: TiledMLP, x: Tensor) -> Tensor:
    """A GPT's layer on one device and without dropout, its MLP tiled: (1, tokens, width) -> the same."""
    qkv = block.qkv(block.attention_norm(x))
    q, k, v = qkv.view(*x.shape[:2], 3, block.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + block.out(mixed.transpose(1, 2).reshape(x.shape))
    result: Tensor = x + mlp(block.mlp_norm(x))
    return result


def alst(trained: Any) -> Run:
    """Layer inputs on the host by streams of their own, each MLP tiled, the loss tiled.

    Raises:
        NotImplementedError: the model's layers have no MLP of their own.
    """
    for block in blocks_of(trained):
        _tile(block)
    checkpointed_on_streams(trained)
    return lambda tokens, labels: _TiledLoss.apply(
        _states(trained, tokens).flatten(0, 1), head_of(trained).weight, shifted(labels)
    )


def liger(trained: Any) -> Run:
    """Checkpointing with Liger's fused linear cross entropy.

    Raises:
        ImportError: liger-kernel is not installed, so that the row is asked for again.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    checkpointed(trained)

    def run(tokens: Tensor, labels: Tensor) -> Tensor:
        result = Fused.apply(_states(trained, tokens).flatten(0, 1), head_of(trained).weight, shifted(labels))
        loss: Tensor = result[0] if isinstance(result, tuple) else result
        return loss

    return run


def _states(trained: Any, tokens: Tensor) -> Tensor:
    """What the head reads, each layer run by the peer's `wrap`."""
    if isinstance(trained, HFTrained):
        return trained.hidden(tokens)
    return _hidden(trained.model, tokens, trained.wrap)
