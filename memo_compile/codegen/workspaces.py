"""What the calls in an emitted body take for themselves: that of the FX nodes that they carry out.

Private torch APIs, tried with torch 2.13: `GraphLowering.name_to_buffer`, `ExternKernel.fx_node` and its origins,
`NopKernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.fx as fx

from memo_compile.passes.analysis.liveness import WORKSPACE
from memo_compile.passes.fx.facts import op_name
from memo_compile.workspaces.annotate import Workspaces

CALLED = "torch.ops."


def workspaces_of(graph: Any) -> Callable[[Sequence[str], str], int]:
    """For an Inductor graph: the bytes that a call takes, by the names of its results, and by what it calls."""
    by_op: dict[str, list[fx.Node]] = {}
    for node in graph.module.graph.nodes:
        by_op.setdefault(op_name(node), []).append(node)

    def taken(names: Sequence[str], label: str) -> int:
        nodes = [n for name in names for n in _carried_out(graph.name_to_buffer.get(name))]
        # A call without results is known by its op alone.
        nodes = nodes or by_op.get(label.removeprefix(CALLED), [])
        return max(map(_bytes, nodes), default=0)

    return taken


def _bytes(node: fx.Node) -> int:
    """As it was annotated; Inductor's own passes make nodes that were not."""
    if WORKSPACE not in node.meta:
        node.meta[WORKSPACE], _ = Workspaces(fused=True).of(node)
    return int(node.meta[WORKSPACE])


def _carried_out(buffer: Any) -> Iterator[fx.Node]:
    """The FX nodes whose kernel makes a buffer; none where it is Inductor's own."""
    from torch._inductor import ir  # loads Inductor

    if isinstance(buffer, ir.ExternKernel) and not isinstance(buffer, ir.NopKernel):
        known = [getattr(buffer, "fx_node", None), buffer.get_origin_node()]
        yield from (n for n in known if isinstance(n, fx.Node) and n.op == "call_function")
        yield from (n for n in buffer.get_origins() if n.op == "call_function")
