"""Attention in the spellings that models have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

HEADS = 4
ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "how": ("causal", "full", "masked", "float mask", "scores", "scores and mask", "each head"),
    "packed": (False, True),
    "groups": ("none", "repeated", "expanded", "enabled"),
    "positions": ("none", "real", "complex"),
    "again": ("none", "none", "sine of q", "square of q", "sine of k", "v", "all"),
    "early": (True, False),
    "frozen": (False, False, True),
    "dropout": (0.0, 0.0, 0.0, 0.2),
}


class Attention(nn.Module):
    """Queries, keys and values, also read again beside the attention."""

    def __init__(
        self,
        width: int,
        tokens: int,
        how: str,
        packed: bool,
        groups: str,
        positions: str,
        again: str,
        early: bool,
        frozen: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.how, self.groups, self.positions, self.again, self.early = how, groups, positions, again, early
        self.dropout = dropout
        self.kv_heads = HEADS if groups == "none" else HEADS // 2
        head = width // HEADS
        sizes = [HEADS * head, self.kv_heads * head, self.kv_heads * head]
        self.sizes = sizes if packed else None
        self.parts = nn.ModuleList(nn.Linear(width, n) for n in ([sum(sizes)] if packed else sizes))
        self.out = nn.Linear(width, width)
        if frozen:
            self.parts.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sizes is not None:
            parts = list(self.parts[0](x).split(self.sizes, -1))
        else:
            parts = [part(x) for part in self.parts]
        heads = (HEADS, self.kv_heads, self.kv_heads)
        q, k, v = (p.unflatten(-1, (n, -1)).transpose(1, 2) for p, n in zip(parts, heads, strict=True))
        if self.positions != "none":
            q, k = (_turned(t, self.positions) for t in (q, k))
        if self.groups in ("repeated", "expanded"):
            k, v = (self._repeated(t) for t in (k, v))
        early = self._read_again(q, k, v) if self.early else None
        y = self._attention(q, k, v)
        beside = early if early is not None else self._read_again(q, k, v)
        if beside is not None:
            y = y + beside
        return x + self.out(y.transpose(1, 2).flatten(2))

    def _repeated(self, t: torch.Tensor) -> torch.Tensor:
        times = HEADS // self.kv_heads
        if self.groups == "repeated":
            return t.repeat_interleave(times, 1)
        return t.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)

    def _read_again(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        k, v = (t if t.shape == q.shape else t.repeat_interleave(2, 1) for t in (k, v))
        return {
            "none": lambda: None,
            "sine of q": lambda: q.sin(),
            "square of q": lambda: q.square() + q,
            "sine of k": lambda: k.sin(),
            "v": lambda: v * 0.5,
            "all": lambda: (q * k).tanh() + v,
        }[self.again]()

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = q.shape[2]
        blocked = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        grouped = {"enable_gqa": True} if self.groups == "enabled" else {}
        if self.how in ("scores", "scores and mask"):
            if grouped:
                k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if self.how == "scores and mask":
                scores = scores.masked_fill(blocked, float("-inf"))
            return F.dropout(scores.softmax(-1), self.dropout) @ v
        mask = {
            "masked": lambda: ~blocked,
            "float mask": lambda: torch.zeros(rows, rows, dtype=q.dtype, device=q.device).masked_fill(blocked, -1e4),
            "each head": lambda: q.new_ones(HEADS, 1, 1) * torch.arange(rows, device=q.device).to(q.dtype) / rows,
        }.get(self.how, lambda: None)()
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.how == "causal", dropout_p=self.dropout, **grouped
        )


def _turned(t: torch.Tensor, how: str) -> torch.Tensor:
    """Rotary positions, in real or in complex numbers; t is (batch, heads, rows, head)."""
    half = t.shape[-1] // 2
    angles = torch.arange(t.shape[2], device=t.device)[:, None] / 10.0 ** torch.arange(half, device=t.device)
    angles = angles.to(t.dtype)
    if how == "complex":
        turned = torch.view_as_complex(t.unflatten(-1, (half, 2)).contiguous()) * torch.polar(angles.cos() ** 0, angles)
        return torch.view_as_real(turned).flatten(-2)
    cosine, sine = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    return t * cosine + torch.cat([-t[..., half:], t[..., :half]], -1) * sine
