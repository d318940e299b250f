"""The custom ops of namespace `memo`, as they stand in graphs and in emitted code.

* `host_lease(nbytes, budget) -> Tensor`: a block of the host arena
* `offload(src, lease!, offset)`, `offload_wait(src, lease!, offset)`: D2H; the wait reads `src`, so that nothing writes
  there before it
* `prefetch_(dst!, lease, offset)`, `wait_(dst!, lease, offset)`: H2D; readers of `dst` stand behind the wait
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from memo_compile.runtime.engine import Engine, Recorder, TransferStats
from memo_compile.runtime.host import HostPool
from memo_compile.runtime.threads import ThreadEngine

_SCHEMAS = (
    "host_lease(SymInt nbytes, SymInt budget) -> Tensor",
    "offload(Tensor src, Tensor(a!) lease, SymInt offset) -> ()",
    "offload_wait(Tensor src, Tensor(a!) lease, SymInt offset) -> ()",
    "prefetch_(Tensor(a!) dst, Tensor lease, SymInt offset) -> ()",
    "wait_(Tensor(a!) dst, Tensor lease, SymInt offset) -> ()",
)


@cache
def recorder() -> Recorder:
    """The process's transfer counters."""
    return Recorder()


@cache
def pool() -> HostPool:
    """The process's host arena."""
    return HostPool()


@cache
def engine(device: torch.device) -> Engine:
    """The engine that copies to and from one device."""
    if device.type == "cuda":
        from memo_compile.runtime.streams import StreamEngine

        return StreamEngine(device, recorder())
    return ThreadEngine(recorder())


def transfer_stats() -> TransferStats:
    """Bytes and copies each way since the process began."""
    return recorder().stats


def _host_lease(nbytes: int, budget: int) -> torch.Tensor:
    return pool().lease(nbytes, budget)


def _offload(src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    engine(src.device).offload(src, lease, offset)


def _offload_wait(src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    engine(src.device).offload_wait(src, lease, offset)


def _prefetch(dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    engine(dst.device).prefetch(dst, lease, offset)


def _wait(dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    engine(dst.device).prefetch_wait(dst)


def _fake_lease(nbytes: int, budget: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _fake_nothing(*args: Any) -> None:
    return None


@cache
def register() -> torch.library.Library:
    """Define the ops; once, at the first call. The library lives as long as what this returns."""
    library = torch.library.Library("memo", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    for name, function in (
        ("host_lease", _host_lease),
        ("offload", _offload),
        ("offload_wait", _offload_wait),
        ("prefetch_", _prefetch),
        ("wait_", _wait),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
        fake = _fake_lease if name == "host_lease" else _fake_nothing
        torch.library.register_fake(f"memo::{name}", fake, lib=library)
    return library
