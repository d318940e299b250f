"""Checks that nothing reads rows that are still on their way from the host, by Inductor's own dependencies.

Of a value that is prefetched in part, kernels write the other rows meanwhile, given the same buffer: the text does not
tell those that write from those that read. The scheduler's nodes do.

Private torch APIs, tried with torch 2.11 (on CUDA) and 2.13: `V.graph.scheduler` with `nodes` and
`mutation_real_name`; of its nodes `get_nodes`, `read_writes` and `node`; `MemoryDep`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.utils._pytree as pytree

from memo_compile.codegen.emitted.text import TransferOp
from memo_compile.codegen.scheduler.dependencies import has_name, roots_of
from memo_compile.codegen.scheduler.order import transfer_of_node
from memo_compile.errors import EmittedOrderChanged
from memo_compile.passes.fx.facts import schema_name_of

_WRITE_THEIR_FIRST = ("memo::mm_into_", "memo::addmm_into_", "aten::copy_")


def check_arrivals() -> None:
    """No node of the graph that Inductor is emitting may read a value some rows of which are still to come.

    Raises:
        EmittedOrderChanged: naming the first that does.
    """
    from torch._inductor.virtualized import V  # loads Inductor

    graph: Any = V.graph
    nodes: Sequence[Any] = graph.scheduler.nodes
    arrived = {
        name: at
        for at, node in enumerate(nodes)
        if transfer_of_node(node) is TransferOp.WAIT
        for name in _real(graph, [node.node.inputs[0].get_name()])
    }
    for at, node in enumerate(nodes):
        early = sorted(name for name in _real(graph, _read_by(node)) if at < arrived.get(name, at))
        if early:
            raise EmittedOrderChanged(
                f"{node.get_name()} reads {early[0]}, some of whose rows have not yet come back from the host. This is "
                "a mistake in memo: please report it with a dump (dump=...). offload=False avoids it."
            )


def _real(graph: Any, names: Sequence[str]) -> set[str]:
    """The buffers behind names of what was written in place, and of views."""
    renamed = [graph.scheduler.mutation_real_name.get(name, name) for name in names]
    return {*renamed, *(root for name in renamed for root in roots_of(graph, name))}


def _read_by(node: Any) -> list[str]:
    return [name for part in node.get_nodes() for name in _reads(part)]


def _reads(node: Any) -> Iterator[str]:
    """Names of buffers whose elements a node reads: not those that only say what it must come after."""
    from torch._inductor.dependencies import MemoryDep  # loads Inductor

    if type(node).__name__ == "SchedulerNode":
        yield from (d.name for d in node.read_writes.reads if isinstance(d, MemoryDep))
    elif type(node).__name__ != "NopKernelSchedulerNode" and transfer_of_node(node) is None:
        given = list(getattr(node.node, "inputs", ()))
        op = schema_name_of(getattr(node.node, "op_overload", None))
        written = given[:1] if op in _WRITE_THEIR_FIRST else []
        yield from (v.get_name() for v in pytree.tree_leaves(given[len(written) :]) if has_name(v))
