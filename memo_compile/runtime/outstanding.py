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

from memo_compile.passes.fx.facts import is_on_host, nbytes, storage_of
from memo_compile.planning.prepared import held_between
from memo_compile.runtime.calls import Boxed, boxed


@dataclass(frozen=True)
class Kept:
    """What a call of a forward graph keeps: bytes on the device and on the host, and the output that lives as long.

    The graph was planned for `calls` of it at once. Graphs of one `family` are of one function, and share these calls.
    `device` is None where all is on the host.
    """

    graph: str
    family: str
    calls: int
    bytes: int
    host_bytes: int
    witness: int
    device: torch.device | None = None


@dataclass(frozen=True)
class Call:
    """A call that has had no backward while `witness` is there."""

    witness: StorageWeakRef
    device: torch.device
    kept: Kept


@dataclass
class Ledger:
    """Calls that have had no backward yet. Safe to use from several threads."""

    calls: list[Call] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, witness: torch.Tensor, kept: Kept) -> None:
        """Count a call that keeps `witness`."""
        call = Call(StorageWeakRef(witness.untyped_storage()), kept.device or witness.device, kept)
        with self.lock:
            self.calls = [*(c for c in self.calls if not c.witness.expired()), call]

    def outstanding(self, graph: str) -> int:
        """How many calls of a graph there are."""
        with self.lock:
            return sum(c.kept.graph == graph and not c.witness.expired() for c in self.calls)

    def bytes_of(self, graph: str) -> list[int]:
        """What each of a graph's calls holds on its device, as planned."""
        with self.lock:
            return [c.kept.bytes for c in self.calls if c.kept.graph == graph and not c.witness.expired()]

    def of_family(self, family: str) -> int:
        """How many calls of a family's graphs there are."""
        with self.lock:
            return sum(c.kept.family == family and not c.witness.expired() for c in self.calls)

    def held(self, device: torch.device, *, beside: str = "", family: str = "") -> int:
        """Bytes on a device, as planned (at the upper end where lengths vary), of all graphs but one, `beside`.

        Of a family that has begun, the calls that are still to come count, too; not of `family`, to which that one
        belongs: they are its own.
        """
        return sum(n * k.bytes for k, n in self._beside(beside, family, device))

    def on_host(self, *, beside: str = "", family: str = "") -> int:
        """As `held`, of host memory."""
        return sum(n * k.host_bytes for k, n in self._beside(beside, family, None))

    def _beside(self, graph: str, family: str, device: torch.device | None) -> list[tuple[Kept, int]]:
        with self.lock:
            there = [
                c.kept for c in self.calls if (device is None or _same(c.device, device)) and not c.witness.expired()
            ]
        latest = {k.family: k for k in there if k.family != family}
        to_come = [(k, k.calls - sum(other.family == f for other in there)) for f, k in latest.items()]
        return [*((k, 1) for k in there if k.graph != graph), *((k, max(0, n)) for k, n in to_come)]


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


def kept_by(forward: fx.GraphModule, num_forward_outputs: int, graph: str, family: str, calls: int) -> Kept | None:
    """What a planned forward keeps, be it on the host; None where that is nothing of its own."""
    (output,) = forward.graph.find_nodes(op="output")
    saved = [(nbytes(n), i) for i, n in enumerate(output.args[0]) if i >= num_forward_outputs and _is_memory(n)]
    if not saved:
        return None
    devices = [n.meta["val"].device for n in output.args[0] if _is_memory(n) and not is_on_host(n)]
    return Kept(
        graph=graph,
        family=family,
        calls=calls,
        bytes=held_between(forward),
        host_bytes=_on_host(forward),
        witness=max(saved)[1],
        device=devices[0] if devices else None,
    )


def _on_host(forward: fx.GraphModule) -> int:
    leases = [n for n in forward.graph.nodes if n.op == "call_function" and is_on_host(n)]
    return sum(size for lease in leases if isinstance(size := lease.args[0], int))


def _is_memory(node: Any) -> bool:
    """Whether an output is memory that the graph has made."""
    return (
        isinstance(node, fx.Node)
        and storage_of(node).op != "placeholder"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and (nbytes(node) > 0 or is_on_host(node))
    )


def noted(forward: Callable[[list[Any]], Any], kept: Kept | None) -> Boxed:
    """`forward`, a boxed call, of which each call is counted."""
    if kept is None:
        return forward

    def run(args: list[Any]) -> Any:
        outputs = forward(args)
        ledger().note(outputs[kept.witness], kept)
        return outputs

    return boxed(run)
