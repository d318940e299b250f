"""Writes into each node what its call takes for itself: `liveness.WORKSPACE`, bytes, and how they are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from memo_compile.passes.analysis.liveness import WORKSPACE, lifetimes
from memo_compile.passes.fx.facts import is_pointwise, is_reduction, is_view, nbytes, op_name, source_line, storage_of
from memo_compile.passes.fx.ranges import at_the_upper_end
from memo_compile.passes.transforms.tile_bodies import bodies
from memo_compile.passes.transforms.tiles import program_in
from memo_compile.schema import Workspace
from memo_compile.workspaces.calls import by_call
from memo_compile.workspaces.formulas import by_formula
from memo_compile.workspaces.seen import seen

HOW = "memo_workspace_how"
UNKNOWN = "unknown, until the first step"

# Ops that Inductor lowers to kernels of somebody else's, some of them only at some shapes.
_EXTERN = frozenset({"aten::convolution", "aten::sort", "aten::topk", "aten::mm", "aten::addmm", "aten::bmm"})
_OURS = frozenset({"memo", "memo_collectives", "prims", "inductor"})  # which allocate nothing, or have a formula


@dataclass(frozen=True)
class Workspaces:
    """Where to look for what calls take.

    With `fused`, a compiler makes loops of all that it can, and only what it leaves to kernels takes any. `measure`
    says whether ops may be called to be measured: not where a plan is made for another machine. With `low`, so may
    kernels of low precision on the CPU, of which each processor has its own. Where `given`, by node, there is nothing
    else.
    """

    fused: bool
    measure: bool = True
    low: bool = False
    given: Mapping[str, Workspace] | None = None

    def annotate(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Find out for each node of `gm`, and of the graphs that its nodes call."""
        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.meta[WORKSPACE], node.meta[HOW] = self.of(node)
            program = program_in(node)
            for key in program.kinds if program is not None else ():
                self.annotate(bodies()[key])
        return gm

    def of(self, node: fx.Node) -> tuple[int, str]:
        """The bytes of one call beyond its results, and how they are known; "" where there is nothing to know."""
        if self.given is not None:
            known = self.given.get(node.name)
            return (0, "") if known is None else (known.bytes, known.how)
        node = at_the_upper_end(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            inner = self._of_subgraphs(node)
            return (0, "") if inner is None else (inner, "its subgraph")
        before = seen().of(node) or 0
        exact = by_formula(node, measure=self.measure and self.low)
        if exact is not None and exact >= before:
            return exact, "formula"
        if exact is None and not before and not self._is_foreign(node):
            return 0, ""
        called = by_call(node) if self.measure and node.target.namespace == "aten" else None
        if called is None and not before:
            return 0, UNKNOWN
        return max(called or 0, before), "measured" if called is not None and called >= before else "seen in a step"

    def _is_foreign(self, node: fx.Node) -> bool:
        """Whether a kernel runs it that is not memo's or the compiler's own."""
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        if target.namespace in _OURS or is_view(node) or is_pointwise(node) or "val" not in node.meta:
            return False
        if target.namespace.startswith(("_c10d", "c10d", "_dtensor")):
            return False
        if not self.fused or target.namespace != "aten":
            return True
        return not is_reduction(node) and (target._schema.name in _EXTERN or _falls_back(target))

    def _of_subgraphs(self, node: fx.Node) -> int | None:
        """The most that a graph which the node calls holds beyond the node's results; None where it calls none."""
        graphs = [g for g in map(graph_of, node.all_input_nodes) if g is not None]
        if not graphs:
            return None
        name = getattr(node.target, "__name__", "")
        previous = sum(map(nbytes, node.all_input_nodes)) if name in _LOOPS else 0  # of the round before
        return max(self.peak_within(g, previous) for g in graphs)

    def peak_within(self, gm: fx.GraphModule, previous: int = 0) -> int:
        """Bytes that running `gm` holds at most beside its inputs and beyond its results."""
        self.annotate(gm)
        lives = lifetimes(gm, fused=self.fused)
        (output,) = gm.graph.find_nodes(op="output")
        made = {storage_of(n) for n in output.all_input_nodes}
        results = sum(nbytes(n) for n in made if n.op == "call_function")
        return max(0, max(lives.live_bytes(), default=0) + previous - results)


_LOOPS = frozenset({"while_loop", "scan", "associative_scan", "map_impl", "map"})


def graph_of(node: fx.Node) -> fx.GraphModule | None:
    """The graph that a node of a graph stands for: an argument of a higher-order op."""
    if node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None) if owner is not None else None
    return value if isinstance(value, fx.GraphModule) else None


def _falls_back(target: torch._ops.OpOverload) -> bool:
    """Whether Inductor has no lowering for the op, or one that calls the op."""
    from torch._inductor import lowering  # loads Inductor

    return target in lowering.fallbacks or target not in lowering.lowerings


def workspaces_in(*graphs: fx.GraphModule) -> tuple[Workspace, ...]:
    """What the calls of annotated graphs take, the largest first; those of which it is not known last."""
    found = [
        Workspace(n.name, op_name(n), int(n.meta[WORKSPACE]), n.meta[HOW], source_line(n))
        for gm in graphs
        for n in gm.graph.nodes
        if n.meta.get(WORKSPACE) or n.meta.get(HOW) == UNKNOWN
    ]
    return tuple(sorted(found, key=lambda w: (-w.bytes, w.node)))
