"""Formulas of what a fallback kernel allocates for itself while it runs, beyond its outputs, each from its source."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import is_tensor
from memo_compile.passes.fx.facts import MATMULS, nbytes, schema_name
from memo_compile.passes.fx.heads import adds_up, head_slices
from memo_compile.passes.transforms.tile_bodies import LOW
from memo_compile.passes.transforms.tiles import program_in
from memo_compile.workspaces.low_precision import is_low_on_cpu, of_attention, of_product


def by_formula(node: fx.Node, *, measure: bool = True) -> int | None:
    """The scratch of one call, in bytes; threads are those that torch has now. None for an op without a formula.

    Args:
        measure: whether kernels of low precision, of which the CPU has its own, may be called to be measured.
    """
    name = schema_name(node)
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return _flash_on_cpu(node.args[0], node.args[1], backward=False, measure=measure)
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return _copied(node.args[0]) + _flash_on_cpu(node.args[1], node.args[2], backward=True, measure=measure)
    if name == "memo::attention_onto":
        return _a_piece_on_cpu(node, backward=False, measure=measure)
    if name == "memo::attention_backward_onto":
        return _a_piece_on_cpu(node, backward=True, measure=measure)
    if name in _PRODUCTS:
        left, right = (a.meta["val"] for a in node.args[-2:])  # type: ignore[union-attr]
        return of_product(left, right) if measure and is_low_on_cpu(left) else 0
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        return _flash_backward_on_cuda(node.args[0], node.args[1], node.args[2])
    if name == "aten::_scaled_dot_product_cudnn_attention_backward":
        return _cudnn_backward(node.args[1])
    if name == "aten::_scaled_dot_product_efficient_attention_backward":
        return _efficient_backward_on_cuda(node.args[0], node.args[1], node.args[3])
    if name.startswith("_c10d_functional::"):
        return _of_gloo(node)
    if name == "memo::add_rows_":
        return _bytes(node.args[1].meta["val"])  # type: ignore[union-attr]
    if name == "memo::tiled_":
        program = program_in(node)
        return program.scratch if program is not None else None
    return 0 if name in _NONE else None


# Their last two arguments are matrices.
_PRODUCTS = MATMULS | {"memo::mm_into_", "memo::addmm_into_", "memo::addmm_onto_"}

# These allocate their results alone (cuBLAS's own workspace is the process's, and stays).
_NONE = frozenset(
    {
        "aten::copy_",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }
)


def _a_piece_on_cpu(node: fx.Node, *, backward: bool, measure: bool) -> int:
    """`memo_compile.runtime.attention`: what one piece makes, the sums beside it, and the kernel's own.

    Of the queries the backward makes their gradient and a dense copy of the output's, here a part of it.
    """
    places = {"q": 0, "k": 1, "v": 2, "pieces": 8} if backward else {"q": 0, "k": 2, "v": 3, "pieces": 6}
    query, key, value = (node.args[places[name]] for name in ("q", "k", "v"))
    beside, pieces = node.args[3 if backward else 1], node.args[places["pieces"]]
    q, k, v, other = (n.meta["val"] for n in (query, key, value, beside))  # type: ignore[union-attr]
    assert isinstance(pieces, int)
    batch, heads, shared = int(q.shape[0]), int(q.shape[1]), int(k.shape[1])
    of_queries, of_keys = (_bytes(q) + _bytes(other)) // heads, (_bytes(k) + _bytes(v)) // shared if backward else 0
    parts = not backward or adds_up(q.dtype)
    held = most = 0
    for calls in head_slices(batch, heads, shared, pieces, parts=parts):
        most = max(most, *(of.stop - of.start for of, _ in calls))
        sums = of_keys * (calls[0][1].stop - calls[0][1].start) if len(calls) > 1 else 0
        made = max(of_queries * (of.stop - of.start) + of_keys * (by.stop - by.start) for of, by in calls)
        held = max(held, sums + made)
    return held + _flash_on_cpu(query, key, backward=backward, heads=most, measure=measure)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cudnn_backward(query: Any) -> int:
    """cuDNN's fused backward on Hopper, measured: queries' gradients summed in float32, beside two sums a row."""
    q: torch.Tensor = query.meta["val"]  # (batch, heads, rows, head)
    return 4 * q.numel() + 8 * q.numel() // int(q.shape[3])


def _of_gloo(node: fx.Node) -> int | None:
    """torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, measured: gathers and scatters go through a dense copy.

    It lies there from the start to the wait at the latest, and is told of both. None on other devices.
    """
    op = schema_name(node).removeprefix("_c10d_functional::")
    first: Any = node.args[0]
    given: list[fx.Node] = list(first) if isinstance(first, (list, tuple)) else [first]
    if op == "wait_tensor":
        started = given[0].all_input_nodes[0] if given[0].target is operator.getitem else given[0]
        begun = schema_name(started).startswith("_c10d_functional::") and started is not node
        return _of_gloo(started) if begun else None
    if not all(is_tensor(n) and n.meta["val"].device.type == "cpu" for n in given):
        return None
    results = node.meta["val"]
    read, made = sum(map(nbytes, given)), sum(map(_bytes, results if isinstance(results, (list, tuple)) else [results]))
    taken = {
        "all_gather_into_tensor": made,
        "all_gather_into_tensor_coalesced": 2 * made,
        "reduce_scatter_tensor": read,
        "reduce_scatter_tensor_coalesced": read,
        "all_reduce_coalesced": read,
    }
    return taken.get(op, 0)


def _copied(gradient: Any) -> int:
    """A dense copy of an output's gradient (batch, heads, rows, head), where it does not lie token after token."""
    given: torch.Tensor = gradient.meta["val"]
    return 0 if given.transpose(1, 2).is_contiguous() else given.numel() * given.element_size()


def _flash_backward_on_cuda(gradient: Any, query: Any, key: Any) -> int:
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
    return scratch + _copied(gradient)


def _efficient_backward_on_cuda(gradient: Any, query: Any, value: Any) -> int:
    """aten/src/ATen/native/transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h.

    One sum a row, which float32 makes from a matmul of the whole, and the gradient of the queries, summed in float32
    in blocks of rows by 64 features.
    """
    q: torch.Tensor = query.meta["val"]
    batch, heads, rows, head = (int(s) for s in q.shape)
    wide = int(value.meta["val"].shape[3])
    sums = 4 * batch * heads * rows
    half = q.element_size() == 2
    whole = 0 if half else 4 * batch * heads * rows * wide + sums
    block = 64 if max(head, wide) <= 64 else 128
    summed = batch * heads * -(-rows // block) * -(-head // 64) * (4 * block * 64 + 16)
    return _copied(gradient) + max(whole, sums + summed)


def _flash_on_cpu(query: Any, key: Any, *, backward: bool, heads: int | None = None, measure: bool = True) -> int:
    """aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: one block of scores for each thread, two in the backward.

    The backward has one sum a row beside them. In low precision it is measured. `heads`: those of one call, by default
    all.
    """
    q: torch.Tensor = query.meta["val"]
    rows, head, columns = int(q.shape[2]), int(q.shape[3]), int(key.meta["val"].shape[2])
    if measure and is_low_on_cpu(q):
        calls = int(q.shape[0]) * (heads or int(q.shape[1]))
        measured = of_attention(q.dtype, calls, rows, columns, head, backward=backward)
        if measured is not None:
            return measured
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32
    split, columns = min(split, rows), min(512, columns)
    each = 2 * split * columns + split if backward else split * columns + 2 * split + split * head
    accumulated = 8 if q.dtype == torch.float64 else 4
    reduced = 0
    if q.dtype in LOW:
        reduced = split * columns * 2 * (2 if backward else 1)
    return torch.get_num_threads() * (each * accumulated + reduced)
