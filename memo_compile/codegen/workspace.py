"""Bytes that a fallback kernel allocates for itself while it runs, beyond its outputs.

They lie outside every arena, and count. A formula an op, each from the kernel's source; an op without one counts 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from memo_compile.runtime.attention import heads_of_piece


def workspace_bytes(node: fx.Node) -> int:
    """The scratch of one call; threads are those that torch has now."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return _flash_on_cpu(node.args[0], node.args[1], backward=False)
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return _flash_on_cpu(node.args[1], node.args[2], backward=True)
    if name == "memo::attention_onto":
        return _a_piece_on_cpu(node, list(node.args[:2]), node.args[2], backward=False)
    if name == "memo::attention_backward_onto":  # which makes a dense copy of the output's gradient, here a part of it
        return _a_piece_on_cpu(node, list(node.args[:4]), node.args[1], backward=True)
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        return _flash_backward_on_cuda(node.args[1], node.args[2])
    return 0


def _a_piece_on_cpu(node: fx.Node, made: list[Any], key: Any, *, backward: bool) -> int:
    """`memo_compile.runtime.attention`: what one piece makes, the size of its part of `made`, and the kernel's own."""
    pieces = node.args[6 if not backward else 8]
    given: list[torch.Tensor] = [n.meta["val"] for n in made]
    assert isinstance(pieces, int)
    batch, heads = (int(s) for s in given[0].shape[:2])
    whole = sum(t.numel() * t.element_size() for t in given)
    return whole * heads_of_piece(batch, heads, pieces) // heads + _flash_on_cpu(made[0], key, backward=backward)


def _flash_backward_on_cuda(query: Any, key: Any) -> int:
    """aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd, not deterministic.

    The gradient of the queries is summed in float32, beside one sum a row; keys that serve several heads get a
    gradient for each head first. The forward has scratch only where it splits a few queries' keys, and counts 0.
    """
    q: torch.Tensor = query.meta["val"]  # (batch, heads, rows, head)
    k: torch.Tensor = key.meta["val"]
    batch, heads, rows, head = (int(s) for s in q.shape)
    padded_rows, padded_head = -(-rows // 128) * 128, 256 if head > 192 else -(-head // 32) * 32
    scratch = 4 * batch * heads * padded_rows * (padded_head + 1)
    if int(k.shape[1]) != heads:
        scratch += 2 * q.element_size() * batch * heads * int(k.shape[2]) * head
    return scratch


def _flash_on_cpu(query: Any, key: Any, *, backward: bool) -> int:
    """aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: one block of scores for each thread, two in the backward."""
    q: torch.Tensor = query.meta["val"]
    rows, head, columns = int(q.shape[2]), int(q.shape[3]), int(key.meta["val"].shape[2])
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32
    split, columns = min(split, rows), min(512, columns)
    each = 2 * split * columns if backward else split * columns + 2 * split + split * head
    accumulated = 8 if q.dtype == torch.float64 else 4
    reduced = 0
    if q.dtype in (torch.bfloat16, torch.float16):
        reduced = split * columns * 2 * (2 if backward else 1)
    return torch.get_num_threads() * (each * accumulated + reduced)
