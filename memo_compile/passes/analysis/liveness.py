"""How long each value of a scheduled graph lives, and how many bytes that is at each step.

A step is one node of the graph. A value's storage is born when its node runs and dies after its last reader, views
followed. Where a compiler fuses (`fused=True`), elementwise results that only elementwise ops and reductions read never
reach memory: what they read lives on until the value that does reach memory is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from memo_compile.passes.fx.facts import (
    is_pointwise,
    is_reduction,
    is_view,
    nbytes,
    op_name,
    returns_operands,
    storage_of,
)
from memo_compile.placement.bounds import live_bytes

KEEP = "memo.keep.default"
WORKSPACE = "memo_workspace"  # in a node's meta: bytes that its call allocates for itself, beyond its results


@dataclass(frozen=True)
class LiveRange:
    """One storage: live over the half-open range of steps [start, end)."""

    name: str
    bytes: int
    start: int
    end: int


@dataclass(frozen=True)
class Lifetimes:
    """Live ranges of one graph's storages by the name of the node that makes them. `steps` is the number of nodes.

    `workspaces` are bytes by step that the step's call allocates for itself.
    """

    steps: int
    ranges: dict[str, LiveRange]
    workspaces: Mapping[int, int] = field(default_factory=dict)

    def live_bytes(self, skip: frozenset[str] = frozenset()) -> list[int]:
        """Bytes live during each step, workspaces with them, storages in `skip` left out."""
        ranges = [(r.start, r.end, r.bytes) for r in self.ranges.values() if r.name not in skip]
        return [held + self.workspaces.get(step, 0) for step, held in enumerate(live_bytes(ranges, self.steps))]


def last_reads(gm: fx.GraphModule, *, fused: bool, ignore_output: bool = False) -> dict[str, int]:
    """The step of the last reader of each storage, by the name of the node that made it.

    With `ignore_output` being returned does not count as being read.
    """
    nodes = list(gm.graph.nodes)
    in_memory = {n: not fused or reaches_memory(n) for n in nodes}
    reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
    last: dict[str, int] = {}
    for step, node in enumerate(nodes):
        sources: dict[fx.Node, None] = {}
        for argument in node.all_input_nodes:
            storage = storage_of(argument)
            if in_memory[storage]:
                sources[storage] = None
            else:  # what was fused away is computed here, from what it reads
                sources.update(dict.fromkeys(reads[storage]))
        reads[node] = tuple(sources)
        if in_memory[node] and not is_view(node) and not (ignore_output and node.op == "output"):
            last.update((source.name, step) for source in sources)
    return last


def lifetimes(gm: fx.GraphModule, *, fused: bool, owned_inputs: frozenset[str] = frozenset()) -> Lifetimes:
    """Live ranges of all storages that running `gm` creates, and of the inputs in `owned_inputs`.

    `owned_inputs` names placeholders whose storage the graph itself frees after its last reader (saved activations in
    a backward). Other inputs belong to the caller and are left out. Outputs live to the end.
    """
    nodes = list(gm.graph.nodes)
    last = last_reads(gm, fused=fused)
    ranges = {}
    for step, node in enumerate(nodes):
        owned = node.op == "placeholder" and node.name in owned_inputs
        if not owned and (node.op in ("placeholder", "output", "get_attr") or storage_of(node) is not node):
            continue
        if (fused and not reaches_memory(node)) or not nbytes(node):
            continue
        stop = min(last.get(node.name, step) + 1, len(nodes))
        ranges[node.name] = LiveRange(node.name, nbytes(node), 0 if owned else step, stop)
    workspaces = {step: size for step, node in enumerate(nodes) if (size := _beside(node))}
    return Lifetimes(len(nodes), ranges, workspaces)


def _beside(node: fx.Node) -> int:
    """Bytes live while a node's call runs, beside what ranges tell: its workspace.

    With it go all items of its result: their ranges begin where they are taken out, when its operands may be gone.
    """
    size = int(node.meta.get(WORKSPACE, 0))
    value = node.meta.get("val")
    calls_graphs = WORKSPACE in node.meta and not isinstance(node.target, torch._ops.OpOverload)
    if not isinstance(value, (tuple, list)) or not (size or calls_graphs) or returns_operands(node):
        return size
    return size + sum(v.numel() * v.element_size() for v in value if isinstance(v, torch.Tensor))


def reaches_memory(node: fx.Node) -> bool:
    """Whether a fusing compiler writes this value to memory; a model of Inductor's choice, which codegen corrects."""
    if node.op != "call_function" or not is_pointwise(node) or is_view(node):
        return True
    return not all(_fuses(user) for user in _readers(node))


def _readers(node: fx.Node) -> list[fx.Node]:
    readers: list[fx.Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if is_view(user):
            stack.extend(user.users)
        else:
            readers.append(user)
    return readers


def _fuses(node: fx.Node) -> bool:
    """Whether a kernel for this computes what it reads, too; `memo::keep` puts that in memory, and is no copy of it."""
    return node.op == "call_function" and (is_pointwise(node) or is_reduction(node) or op_name(node) == KEEP)
