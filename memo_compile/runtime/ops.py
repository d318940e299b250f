"""The custom ops of namespace `memo`, as they stand in graphs and in emitted code.

* `host_lease(nbytes, budget, device) -> Tensor`: a block of the host arena, for copies from and to a device
* `offload(src, lease!, offset)`, `offload_wait(src, lease!, offset)`: D2H; the wait reads `src`, so that nothing writes
  there before it
* `prefetch_(dst!, lease, offset)`, `wait_(dst!, lease, offset)`: H2D; readers of `dst` stand after the wait
* `prefetch_buffer(lease, offset, nbytes, device) -> Tensor`: the storage into which the slice at `offset` is prefetched
  already, or a new one; it stands in emitted code alone, in place of an allocation
* `keep(src) -> Tensor`: the rows that stay, alone; a copy that no compiler takes for a view of the whole value
* `copied(src) -> Tensor`: a copy that no compiler fuses with anything
* `onto(src, size, stride) -> Tensor`: the storage of `src`, as what is to be written over it lies there
* `mm_into_(dst!, a, b)`, `addmm_into_(dst!, bias, a, b)`: matmuls written to their rows of a larger value
* `add_rows_(dst!, index, rows)`: adds rows to those of `dst` that `index` names, some of them several times
* `poison_(dst!)`: the end of a value's life, with `verify="poison"`; see `memo_compile.runtime.poison`
* `attention_onto`, `attention_backward_onto`, and with a `_` after: see `memo_compile.runtime.attention`
* `tiled_`, `addmm_onto_`: see `memo_compile.runtime.tiles`
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from memo_compile.runtime import attention, tiles
from memo_compile.runtime.cross_call import CrossCallPrefetch
from memo_compile.runtime.engine import Engine, Recorder, TransferStats
from memo_compile.runtime.host import HostPool
from memo_compile.runtime.poison import poison
from memo_compile.runtime.threads import ThreadEngine

_SCHEMAS = (
    "host_lease(SymInt nbytes, SymInt budget, Device device) -> Tensor",
    "offload(Tensor src, Tensor(a!) lease, SymInt offset) -> ()",
    "offload_wait(Tensor src, Tensor(a!) lease, SymInt offset) -> ()",
    "prefetch_(Tensor(a!) dst, Tensor lease, SymInt offset) -> ()",
    "wait_(Tensor(a!) dst, Tensor lease, SymInt offset) -> ()",
    "prefetch_buffer(Tensor lease, SymInt offset, SymInt nbytes, Device device) -> Tensor",
    "keep(Tensor src) -> Tensor",
    "copied(Tensor src) -> Tensor",
    "onto(Tensor(a) src, SymInt[] size, SymInt[] stride) -> Tensor(a)",
    "mm_into_(Tensor(a!) dst, Tensor a, Tensor b) -> ()",
    "addmm_into_(Tensor(a!) dst, Tensor bias, Tensor a, Tensor b) -> ()",
    "add_rows_(Tensor(a!) dst, Tensor index, Tensor rows) -> ()",
    "poison_(Tensor(a!) dst) -> ()",
    *attention.SCHEMAS,
    *tiles.SCHEMAS,
)


@cache
def recorder() -> Recorder:
    """The process's transfer counters."""
    return Recorder()


@cache
def pool() -> HostPool:
    """The process's host arena."""
    return HostPool(on_return=_lease_is_gone, before_free=_block_goes)


@cache
def _of_device() -> dict[torch.device, tuple[Engine, CrossCallPrefetch]]:
    return {}


def _transfers(device: torch.device) -> tuple[Engine, CrossCallPrefetch]:
    known = _of_device()
    found = known.get(device)
    if found is None:
        made = _make_engine(device)
        found = known.setdefault(device, (made, CrossCallPrefetch(made, device, pool().borrow)))
    return found


def _make_engine(device: torch.device) -> Engine:
    if device.type == "cuda":
        from memo_compile.runtime.streams import StreamEngine  # only where there is a GPU

        return StreamEngine(device, recorder())
    return ThreadEngine(recorder())


def engine(device: torch.device) -> Engine:
    """The engine that copies to and from one device."""
    return _transfers(device)[0]


def cross_calls(device: torch.device) -> CrossCallPrefetch:
    """The outstanding calls of one device."""
    return _transfers(device)[1]


def reclaim() -> None:
    """Do what the collection of leases has left to do."""
    pool().reclaim()


def _lease_is_gone(address: int) -> None:
    for mover, calls in list(_of_device().values()):
        calls.forget(address)
        mover.forget_lease(address)


def _block_goes(address: int) -> None:
    for mover, _ in list(_of_device().values()):
        mover.forget_block(address)


def transfer_stats() -> TransferStats:
    """Bytes and copies each way since the process began."""
    return recorder().stats


def _host_lease(nbytes: int, budget: int, device: torch.device) -> torch.Tensor:
    return pool().lease(nbytes, budget, device)


def _forget_elsewhere(device: torch.device, lease: torch.Tensor) -> None:
    """All devices share the host's blocks: on the one that had this block before, nothing may still copy."""
    for other, (mover, _) in list(_of_device().items()):
        if other != device:
            mover.forget_block(lease.data_ptr())


def _offload(src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    pool().check_own(lease)
    mover = engine(src.device)
    if len(_of_device()) > 1:
        _forget_elsewhere(src.device, lease)
    mover.offload(src, lease, offset)


def _offload_wait(src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    engine(src.device).offload_wait(src, lease, offset)


def _prefetch(dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    pool().check_own(lease)
    mover, calls = _transfers(dst.device)
    if not calls.adopt(dst, lease, offset):
        mover.prefetch(dst, lease, offset)
    calls.passed(lease)


def _wait(dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    engine(dst.device).prefetch_wait(dst, lease, offset)


def _prefetch_buffer(lease: torch.Tensor, offset: int, nbytes: int, device: torch.device) -> torch.Tensor:
    there = cross_calls(device).place(lease, offset)
    return there if there is not None else torch.empty(nbytes, dtype=torch.uint8, device=device)


def _keep(src: torch.Tensor) -> torch.Tensor:
    return src.clone(memory_format=torch.contiguous_format)


def _onto(src: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    return src.as_strided(size, stride)


def _mm_into(dst: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.mm(a, b, out=dst)


def _addmm_into(dst: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.addmm(bias, a, b, out=dst)


def _add_rows(dst: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """`rows`: (…, width), `index`: (…); an index out of the table is one of its ends, as where nothing is masked."""
    count = dst.shape[0]
    dst.index_put_((index.clamp(-count, count - 1),), rows, accumulate=True)


def _fake_lease(nbytes: int, budget: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _fake_prefetch_buffer(lease: torch.Tensor, offset: int, nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_keep(src: torch.Tensor) -> torch.Tensor:
    return torch.empty(src.shape, dtype=src.dtype, device=src.device)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "host_lease": _host_lease,
    "offload": _offload,
    "offload_wait": _offload_wait,
    "prefetch_": _prefetch,
    "wait_": _wait,
    "prefetch_buffer": _prefetch_buffer,
    "keep": _keep,
    "copied": _keep,
    "onto": _onto,
    "mm_into_": _mm_into,
    "addmm_into_": _addmm_into,
    "add_rows_": _add_rows,
    "poison_": poison,
    "tiled_": tiles.tiled_,
    "addmm_onto_": tiles.addmm_onto_,
    "attention_onto": attention.attention_onto,
    "attention_onto_": attention.attention_onto_,
    "attention_backward_onto": attention.attention_backward_onto,
    "attention_backward_onto_": attention.attention_backward_onto_,
}

_FAKES = {
    "host_lease": _fake_lease,
    "prefetch_buffer": _fake_prefetch_buffer,
    "keep": _fake_keep,
    "copied": _fake_keep,
    "onto": _onto,
    "attention_onto": attention.fake_attention_onto,
    "attention_onto_": attention.fake_token,
    "attention_backward_onto": attention.fake_attention_backward_onto,
    "attention_backward_onto_": attention.fake_token,
}


@cache
def register() -> torch.library.Library:
    """Define the ops; once, at the first call. The library lives as long as what this returns."""
    library = torch.library.Library("memo", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    for name, function in FUNCTIONS.items():
        library.impl(name, function, "CompositeExplicitAutograd")
        fake: Any = _FAKES.get(name, _fake_nothing)
        torch.library.register_fake(f"memo::{name}", fake, lib=library)
    return library


def _never_destroy(value: object) -> None:
    """Streams and events are of the parent's driver: in a child, their destructors end the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _share_nothing() -> None:
    """In a forked child: threads that copied are not there, locks may be held by such threads, blocks are empty."""
    parents = pool() if pool.cache_info().currsize else None
    _never_destroy((_of_device(), parents))
    for shared in (recorder, pool, _of_device):
        shared.cache_clear()
    if parents is not None:
        pool().disown(parents)


os.register_at_fork(after_in_child=_share_nothing)
