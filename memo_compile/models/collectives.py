"""Collectives as single blocking ops, for graphs of one tensor-parallel rank: `memo_collectives::*`.

torch's functional collectives come in two nodes, a start and a wait, and gather along the first dimension only. These
are one node each and work along any dimension, so that the passes see one value with one birth. Unlike torch's they may
run again in the backward, as Megatron does under full recomputation: every rank runs the same plan, so that they meet.

`dim` holds the rows of all ranks one after another: row t of rank r is (r, t). Slice t of a gathered value is therefore
made from slice t of the shards, which is the rule that `passes.analysis.token_rules` has for them.

Private torch API, tried with torch 2.13: `torch.distributed.distributed_c10d._resolve_process_group`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAMESPACE = "memo_collectives"


def process_group(name: str) -> Any:
    """The process group of that name; the default one for ""."""
    if not name:
        return dist.group.WORLD
    from torch.distributed import distributed_c10d  # not in every build of torch

    private: Any = distributed_c10d
    return private._resolve_process_group(name)


@torch.library.custom_op(f"{NAMESPACE}::all_gather", mutates_args=())
def all_gather(x: Tensor, dim: int, ranks: int, group: str, after: Tensor | None = None) -> Tensor:
    """Every rank's `x`, joined along `dim`. With `after`, not before that value exists."""
    rows = x.movedim(dim, 0).contiguous()
    out = rows.new_empty((ranks * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(out, rows, group=process_group(group))
    return out.movedim(0, dim).contiguous()


@all_gather.register_fake
def _(x: Tensor, dim: int, ranks: int, group: str, after: Tensor | None = None) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= ranks
    return x.new_empty(shape)


@torch.library.custom_op(f"{NAMESPACE}::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    """The sum over ranks of `x`, of which each rank gets its share of `dim`."""
    rows = x.movedim(dim, 0).contiguous()
    out = rows.new_empty((rows.shape[0] // ranks, *rows.shape[1:]))
    dist.reduce_scatter_tensor(out, rows, group=process_group(group))
    return out.movedim(0, dim).contiguous()


@reduce_scatter.register_fake
def _(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= ranks
    return x.new_empty(shape)


@torch.library.custom_op(f"{NAMESPACE}::all_reduce", mutates_args=())
def all_reduce(x: Tensor, reduction: str, ranks: int, group: str) -> Tensor:
    """The sum ("sum") or largest ("max") of all ranks' `x`."""
    out = x.clone()
    dist.all_reduce(out, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM, group=process_group(group))
    return out


@all_reduce.register_fake
def _(x: Tensor, reduction: str, ranks: int, group: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::shard", mutates_args=())
def shard(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    """This rank's share of the rows of `x`, which all ranks hold. Nothing is sent, and the graph names no rank."""
    rows = x.shape[dim] // ranks
    return x.narrow(dim, dist.get_rank(process_group(group)) * rows, rows).clone(memory_format=torch.contiguous_format)


@shard.register_fake
def _(x: Tensor, dim: int, ranks: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= ranks
    return x.new_empty(shape)
