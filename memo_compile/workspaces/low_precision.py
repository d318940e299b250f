"""Scratch of products and fused attention on the CPU in bfloat16 and float16, by calls.

oneDNN lays matrices out anew, for products at each shape in another way: these are called at their own. Attention is
called at small shapes: beside its blocks of scores the kernel (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp) has
keys and values laid out anew where the processor multiplies matrices of that type, and oneDNN takes scratch of its own
for products of blocks. Which of it depends on the processor. Of many heads and tokens only the keys and values grow: so
two calls, of few heads and of twice as many, tell what a call takes once, and what for each head and key.
"""

from __future__ import annotations

import torch

from memo_compile.passes.transforms.tile_bodies import LOW
from memo_compile.workspaces.calls import taken_by

MOST = 1024  # rows and columns of a call that is measured: blocks have at most 256 and 512
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def is_low_on_cpu(value: torch.Tensor) -> bool:
    """Whether kernels on such values are those that are measured here."""
    return value.device.type == "cpu" and value.dtype in LOW


def of_product(left: torch.Tensor, right: torch.Tensor) -> int:
    """Bytes that the product of two matrices takes for itself, or of as many pairs; 0 where that cannot be measured."""
    op = torch.ops.aten.mm.default if left.dim() == 2 else torch.ops.aten.bmm.default
    return taken_by(op, [left, right]) or 0


def of_attention(dtype: torch.dtype, heads: int, rows: int, columns: int, head: int, *, backward: bool) -> int | None:
    """Bytes that a call takes for itself; None where that cannot be measured.

    Args:
        heads: of queries, of all sequences.
        rows, columns: tokens of the queries, and of the keys.
        head: size of a head.
    """
    threads = torch.get_num_threads()
    shape = _like(rows, 256), _like(columns, 512), head
    few, more = (_measured(dtype, count, *shape, backward=backward) for count in (threads, 2 * threads))
    if few is None or more is None:
        return None
    grown = max(0, more - few)  # by the keys and values of as many heads as there are threads
    return max(few, more) - 2 * grown + grown * heads * columns // (threads * shape[1])


def _like(count: int, block: int) -> int:
    """A small number of rows that ends in a block of the same size."""
    return count if count <= MOST else MOST - block + (count % block or block)


def _measured(dtype: torch.dtype, heads: int, rows: int, columns: int, head: int, *, backward: bool) -> int | None:
    query, key = (
        torch.empty((1, count, heads, head), dtype=dtype, device="meta").transpose(1, 2) for count in (rows, columns)
    )
    if not backward:
        return taken_by(_FORWARD, [query, key, key])
    sums = torch.empty((1, heads, rows), device="meta")
    return taken_by(_BACKWARD, [query, query, key, key, query, sums], 0.0, False)
