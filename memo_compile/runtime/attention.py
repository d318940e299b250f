"""A fused attention, a few heads at a time, whose results replace what they were made from.

`memo_compile.passes.transforms.attention` says where that may be. Heads are independent in the kernels
(aten/src/ATen/native/cpu/FlashAttentionKernel.cpp), so that the results are those of one call, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memo_compile.passes.fx.heads import adds_up, head_slices

_Piece = tuple[tuple[slice, slice], tuple[slice, slice]]
_OPTIONS = "float dropout_p, bool is_causal, int pieces, *, Tensor? attn_mask=None, float? scale=None"

# In graphs: what is written over comes first, and comes out as the results. In emitted code (with a `_` after the
# name): the storages that hold it come first, and the result is empty; it names the call, so that what the call
# allocates can be counted.
SCHEMAS = (
    "attention_onto(Tensor(a!) query, Tensor(b!) logsumexp, Tensor key, Tensor value, " + _OPTIONS + ")"
    " -> (Tensor(a!), Tensor(b!))",
    "attention_onto_(Tensor(a!)[] storages, Tensor query, Tensor logsumexp, Tensor key, Tensor value, "
    + _OPTIONS
    + ") -> Tensor",
    "attention_backward_onto(Tensor(a!) query, Tensor(b!) key, Tensor(c!) value, Tensor grad_out, Tensor out, "
    "Tensor logsumexp, " + _OPTIONS + ") -> (Tensor(a!), Tensor(b!), Tensor(c!))",
    "attention_backward_onto_(Tensor(a!)[] storages, Tensor query, Tensor key, Tensor value, Tensor grad_out, "
    "Tensor out, Tensor logsumexp, " + _OPTIONS + ") -> Tensor",
)


def _pieces_of(query: torch.Tensor, key: torch.Tensor, pieces: int, parts: bool) -> Iterator[list[_Piece]]:
    """Of (batch, heads, …): what each call reads of the queries and of the keys, in a list those with the same keys."""
    batch, heads = query.shape[:2]
    everything = slice(None)
    for calls in head_slices(batch, heads, key.shape[1], pieces, parts=parts):
        yield [((everything, of), (everything, shared)) for of, shared in calls]


def _write(places: Sequence[torch.Tensor], kernel: Any, *args: Any, **keywords: Any) -> None:
    """In a call of its own, so that nothing names its results when the next piece is made."""
    for place, result in zip(places, kernel(*args, **keywords), strict=True):
        place.copy_(result)


def _write_and_add(places: Sequence[torch.Tensor], kernel: Any, *args: Any, **keywords: Any) -> None:
    """The same, where what follows the first result is added to its place."""
    result, *terms = kernel(*args, **keywords)
    places[0].copy_(result)
    for place, term in zip(places[1:], terms, strict=True):
        place.add_(term)


def attention_onto(
    query: torch.Tensor,
    logsumexp: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    pieces: int,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the output over `query` (batch, heads, rows, head), the row sums to `logsumexp` (batch, heads, rows)."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for calls in _pieces_of(query, key, pieces, parts=True):
        for of, shared in calls:
            read = (query[of], key[shared], value[shared])
            _write((query[of], logsumexp[of]), kernel, *read, dropout_p, is_causal, **options)
    return query, logsumexp


def attention_backward_onto(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    pieces: int,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write the gradients over `query`, `key` and `value`; all (batch, heads, rows, head).

    Where several calls share keys, their gradients are added up in the order of the queries, and written last.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for calls in _pieces_of(query, key, pieces, parts=adds_up(query.dtype)):
        shared = calls[0][1]
        read = (key[shared], value[shared])
        sums = [torch.zeros_like(t) for t in read] if len(calls) > 1 else []
        for of, _ in calls:
            places = (query[of], *(sums or read))
            given = (grad_out[of], query[of], *read, out[of], logsumexp[of])
            (_write_and_add if sums else _write)(places, kernel, *given, dropout_p, is_causal, **options)
        for place, total in zip(read, sums, strict=False):
            place.copy_(total)
    return query, key, value


def attention_onto_(storages: Sequence[torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    """`attention_onto`, as it stands in emitted code."""
    attention_onto(*args, **options)
    return storages[0].new_empty(0)


def attention_backward_onto_(storages: Sequence[torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    """`attention_backward_onto`, as it stands in emitted code."""
    attention_backward_onto(*args, **options)
    return storages[0].new_empty(0)


def fake_attention_onto(*args: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two arguments."""
    return args[0], args[1]


def fake_attention_backward_onto(*args: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first three arguments."""
    return args[0], args[1], args[2]


def fake_token(storages: Sequence[torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
    """An empty tensor."""
    return storages[0].new_empty(0)
