"""What calls of compiled graphs hold between their forward and their backward: a ledger for each process.

A call counts as long as one of the tensors that it keeps is alive, whether a backward comes or its loss is dropped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.fx as fx
from torch.multiprocessing.reductions import StorageWeakRef

from memo_compile.passes.fx.facts import nbytes, storage_of
from memo_compile.runtime.calls import Boxed, boxed


@dataclass(frozen=True)
class Kept:
    """What a call of a forward graph keeps: bytes in all, and the output by whose life it is told to be kept."""

    bytes: int
    witness: int


@dataclass
class Ledger:
    """Calls that have had no backward yet. Safe to use from several threads."""

    calls: list[tuple[StorageWeakRef, torch.device, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, witness: torch.Tensor, kept: Kept) -> None:
        """Count a call that keeps `witness`."""
        entry = (StorageWeakRef(witness.untyped_storage()), witness.device, kept.bytes)
        with self.lock:
            self.calls = [*(c for c in self.calls if not c[0].expired()), entry]

    def held(self, device: torch.device) -> int:
        """Bytes on a device, as planned: at the upper end where lengths vary."""
        with self.lock:
            return sum(size for ref, where, size in self.calls if _same(where, device) and not ref.expired())


def _same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)


@cache
def ledger() -> Ledger:
    """The process's ledger."""
    return Ledger()


def _lock_anew() -> None:
    """In a forked child: a thread that is not there may hold the lock. What calls hold, the child has copies of."""
    ledger().lock = threading.Lock()


os.register_at_fork(after_in_child=_lock_anew)


def kept_by(forward: fx.GraphModule, num_forward_outputs: int) -> Kept | None:
    """What a planned forward keeps; None where that is nothing of its own."""
    (output,) = forward.graph.find_nodes(op="output")
    saved = [(nbytes(n), i) for i, n in enumerate(output.args[0]) if i >= num_forward_outputs and _own(n)]
    if not any(size for size, _ in saved):
        return None
    storages = {storage_of(n) for n in output.args[0] if _own(n)}
    return Kept(sum(nbytes(s) for s in storages), max(saved)[1])


def _own(node: Any) -> bool:
    """Whether an output is memory that the graph has made."""
    return isinstance(node, fx.Node) and storage_of(node).op != "placeholder"


def noted(forward: Callable[[list[Any]], Any], kept: Kept | None) -> Boxed:
    """`forward`, a boxed call, of which each call is counted."""
    if kept is None:
        return forward

    def run(args: list[Any]) -> Any:
        outputs = forward(args)
        ledger().note(outputs[kept.witness], kept)
        return outputs

    return boxed(run)
