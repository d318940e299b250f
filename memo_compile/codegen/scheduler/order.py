"""Keeps the order of transfers through Inductor, and checks it in the emitted text.

Inductor emits an elementwise value where it is first needed in memory, and fuses it with others, while transfers stand
where they were: by the time code comes out, every wait may stand before the computation that it should overlap with. So
after fusion the transfers are put where the plan has them, among the kernels as they then are. What is emitted is read
back and compared: `EmittedOrderChanged` where it is not the plan.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `config._post_fusion_custom_pass`, scheduler nodes'
`unmet_dependencies`, `get_buffer_names`, `get_nodes`, `node.get_origins()`, and the post-grad graph at
`V.graph.module.graph`.
"""

from __future__ import annotations

import ast
import bisect
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from memo_compile.codegen.emitted.text import TransferOp, call_in, memo_op, statements_of, transfer_op
from memo_compile.errors import EmittedOrderChanged
from memo_compile.passes.fx.facts import MATMULS

STARTS: Mapping[str, TransferOp] = {
    TransferOp.OFFLOAD: TransferOp.OFFLOAD_WAIT,
    TransferOp.PREFETCH: TransferOp.WAIT,
}


@dataclass(frozen=True)
class Step:
    """A transfer at a host offset, or (`offset` None) a matmul: a kernel of its own, behind which copies hide."""

    name: str
    offset: int | None = None

    def __str__(self) -> str:
        return self.name if self.offset is None else f"{self.name} of the slice at host offset {self.offset}"


def planned_steps(gm: fx.GraphModule) -> list[Step]:
    """The order in a graph as the passes left it."""
    steps = []
    for node in gm.graph.nodes:
        name = transfer_of(node)
        if name is not None:
            offset: Any = node.args[2]
            steps.append(Step(name, offset))
        elif _is_matmul(node):
            steps.append(Step(node.name))
    return steps


def transfer_of(node: Any) -> TransferOp | None:
    """The transfer that a node of a graph is."""
    return _transfer_of_op(getattr(node, "target", None))


def _transfer_of_op(target: Any) -> TransferOp | None:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "memo":
        return transfer_op(target._schema.name.split("::")[1])
    return None


def _is_matmul(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name
    written_in_place = name.removeprefix("memo::") in _INTO
    return name in MATMULS or written_in_place or "scaled_dot_product" in name or name.startswith("aten::convolution")


_ATTENTION = ("attention_onto", "attention_onto_", "attention_backward_onto", "attention_backward_onto_")
_INTO = frozenset({"mm_into_", "addmm_into_", *_ATTENTION})


def emitted_steps(lines: Sequence[str]) -> list[Step]:
    """The order in emitted text: transfers, and calls of kernels that Inductor does not write itself."""
    steps = []
    for statement in statements_of(lines):
        call = call_in(statement)
        if call is None:
            continue
        function, moved = ast.unparse(call.func), _moves(call)
        if moved is not None:
            steps.append(Step(moved, ast.literal_eval(call.args[2])))
        elif function.startswith(("extern_kernels.", "torch.ops.aten.")) or memo_op(call) in _INTO:
            steps.append(Step(function))
    return steps


_ASSERTIONS = frozenset({"assert_size_stride", "assert_alignment"})  # these read no data


def check_prefetched_reads(lines: Sequence[str]) -> None:
    """In emitted text, no kernel may use a value that comes back whole from the host before it has been waited for.

    Raises:
        EmittedOrderChanged: naming the first that does.
    """
    statements = [(s, call_in(s)) for s in statements_of(lines)]
    moved = [(i, call) for i, (_, call) in enumerate(statements) if call is not None and _moves(call)]
    waited = {
        call.args[0].id: i
        for i, call in moved
        if _moves(call) is TransferOp.WAIT and isinstance(call.args[0], ast.Name)
    }
    transfers = {i for i, _ in moved}
    for i, (statement, call) in enumerate(statements):
        if call is None or i in transfers or ast.unparse(call.func) in _ASSERTIONS:
            continue
        read = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        early = sorted(name for name in read if i < waited.get(name, i))
        if early:
            raise EmittedOrderChanged(
                f"{ast.unparse(call.func)} uses {early[0]}, which has not yet come back from the host. This is a "
                "mistake in memo: please report it with a dump (dump=...). offload=False avoids it."
            )


def _moves(call: ast.Call) -> TransferOp | None:
    """The transfer that a call is."""
    return transfer_op(memo_op(call))


def overlaps(planned: Sequence[Step]) -> dict[Step, int]:
    """How many matmuls stand between each start and its wait."""
    at = {step: i for i, step in enumerate(planned) if step.offset is not None}
    return {
        start: sum(1 for s in planned[i : at[Step(STARTS[start.name], start.offset)]] if s.offset is None)
        for start, i in at.items()
        if start.name in STARTS
    }


def check_order(planned: Sequence[Step], emitted: Sequence[Step]) -> list[str]:
    """Compare the order of an emitted graph with its plan's.

    Transfers must be the plan's, in its order each way, every wait after its start. Where the plan computes between a
    start and its wait, so should the code; which matmuls those are may differ, since fusion moves them.

    Returns:
        The copies that fusion has left with nothing beside them, in words: they cost time and are no mistake.

    Raises:
        EmittedOrderChanged: naming the first difference.
    """
    for kinds in ((TransferOp.OFFLOAD,), (TransferOp.PREFETCH,), tuple(STARTS), tuple(STARTS.values())):
        want = [s for s in planned if s.offset is not None and s.name in kinds]
        got = [s for s in emitted if s.offset is not None and s.name in kinds]
        if len(kinds) > 1:  # across both ways and among waits only the set is the plan's
            want, got = sorted(want, key=str), sorted(got, key=str)
        if want != got:
            pairs = zip([*want, None], [*got, None], strict=False)
            first = next((w, g) for w, g in pairs if w != g)
            raise EmittedOrderChanged(
                f"the plan has {first[0] or 'nothing more'} where the code has {first[1] or 'none'}."
            )
    place = {step: i for i, step in enumerate(emitted) if step.offset is not None}
    lost = []
    for start, count in overlaps(planned).items():
        begin, end = place[start], place[Step(STARTS[start.name], start.offset)]
        if end < begin:
            raise EmittedOrderChanged(f"the wait for the {start} stands before its start.")
        # At the very ends of a graph there may be nothing left to overlap with.
        beside = emitted[:begin] if start.name == TransferOp.PREFETCH else emitted[end:]
        if count and not _computes(emitted[begin:end]) and _computes(beside):
            lost.append(
                f"between start and end of the {start} the plan computes {count} matmuls, the emitted code none: "
                "nothing overlaps with the copy"
            )
    return lost


def _computes(steps: Sequence[Step]) -> bool:
    return any(s.offset is None for s in steps)


def place_transfers(planned: Sequence[Step]) -> Callable[[list[Any]], list[Any]]:
    """What puts the transfers of scheduler nodes, after fusion, where the plan has them."""
    counts = overlaps(planned)
    return lambda nodes: _placed(nodes, counts)


def _placed(nodes: list[Any], counts: dict[Step, int]) -> list[Any]:
    """Computation keeps its order. A start stands after the last kernel that the graph has before it; a prefetch's
    wait before the first reader; an offload's wait after the last kernel that the graph has before it.

    Dependencies hold whatever the wishes are.
    """
    index = node_index()
    moved = [n for n in nodes if transfer_of_node(n) is not None]
    if not moved:
        return nodes
    makers = {name: n for n in nodes for name in n.get_buffer_names()}
    needs = {n: {makers[d.name] for d in n.unmet_dependencies if d.name in makers} - {n} for n in nodes}
    readers: dict[Any, list[Any]] = {n: [] for n in nodes}
    for node, sources in needs.items():
        for source in sources:
            readers[source].append(node)
    at = {n: positions(n, index) for n in nodes}
    prefetch_buffers = {m for n in moved if transfer_of_node(n) is TransferOp.PREFETCH for m in needs[n] if not at[m]}
    fixed = [n for n in nodes if n not in prefetch_buffers and transfer_of_node(n) is None]
    slot = {n: float(i) for i, n in enumerate(fixed)}
    complete = sorted((at[n][-1], slot[n]) for n in fixed if at[n])
    places = [place for place, _ in complete]
    latest = list(itertools.accumulate((s for _, s in complete), max))
    last = [-1.0, -1.0]  # of offloads, which one lease chains, and of prefetches, which one link serves
    for node in sorted(moved, key=lambda n: at[n][-1]):
        kind = transfer_of_node(node)
        before = bisect.bisect_left(places, at[node][-1])
        wish = latest[before - 1] if before else -1.0
        if kind is TransferOp.WAIT:
            wish = min((slot[r] for r in readers[node] if r in slot), default=wish + 1) - 1
        else:
            way = int(kind is TransferOp.PREFETCH)
            wish = max(wish, last[way])
            last[way] = wish
        slot[node] = wish + 0.5
    _keep_overlap(moved, fixed, at, slot, counts)
    # Starts at one place keep their order, whatever order the scheduler had them in.
    for number, node in enumerate(sorted(moved, key=lambda n: at[n][-1])):
        slot[node] += number * 1e-6
    for node in prefetch_buffers:
        slot[node] = min(slot[r] for r in readers[node] if r in slot)
    return _sorted(nodes, needs, readers, slot)


def _keep_overlap(
    moved: list[Any],
    fixed: list[Any],
    at: dict[Any, list[int]],
    slot: dict[Any, float],
    counts: dict[Step, int],
) -> None:
    """As many matmuls between a start and its wait as in the plan, where fusion has moved one of them.

    A prefetch that the plan waits for at once starts where its wait has gone: earlier, it would only hold memory.
    """
    matmuls = [n for n in fixed if type(n).__name__ == "ExternKernelSchedulerNode"]
    next_slot = float("inf")
    # By offset: what reads a transfer's buffers may be another slice's wait, chained to it by the lease.
    waits = {(transfer_of_node(n), _offset(n)): n for n in moved if transfer_of_node(n) not in STARTS}
    for node in sorted(moved, key=lambda n: -at[n][-1]):
        kind = transfer_of_node(node)
        wait = waits.get((STARTS.get(str(kind)), _offset(node)))
        if wait is not None:
            count = counts.get(Step(str(kind), _offset(node)), 0)
            if kind is TransferOp.OFFLOAD:
                later = [slot[n] for n in matmuls if slot[n] > slot[node]]
                if count and later:
                    slot[wait] = max(slot[wait], later[min(count, len(later)) - 1] + 0.5)
                continue
            earlier = [slot[n] for n in matmuls if slot[n] < slot[wait]]
            if not count:
                slot[node] = max(slot[node], slot[wait])
            elif earlier:
                slot[node] = min(slot[node], earlier[-min(count, len(earlier))] - 0.5)
        if kind is TransferOp.PREFETCH:
            slot[node] = next_slot = min(slot[node], next_slot)  # the link serves them in the graph's order


def transfer_of_node(node: Any) -> TransferOp | None:
    """The same for a scheduler node."""
    return _transfer_of_op(getattr(getattr(node, "node", None), "op_overload", None))


def _offset(node: Any) -> int:
    """The host offset of a scheduler node that is a transfer: its one constant."""
    return next(int(c) for c in node.node.constant_args)


def node_index() -> dict[str, int]:
    """Where each node stands in the post-grad graph that Inductor is lowering, by name."""
    from torch._inductor.virtualized import V  # loads Inductor

    graph: Any = V.graph.module.graph
    return {node.name: i for i, node in enumerate(graph.nodes)}


def positions(node: Any, index: dict[str, int]) -> list[int]:
    """Where in the graph the nodes stand that a scheduler node computes; the last is where it is complete."""
    found = {index[o.name] for n in node.get_nodes() for o in n.node.get_origins() if o.name in index}
    made = [n for n in node.get_nodes() if type(n).__name__ != "NopKernelSchedulerNode"]
    return sorted(found) if made else []


def _sorted(
    nodes: list[Any], needs: dict[Any, set[Any]], readers: dict[Any, list[Any]], slot: dict[Any, float]
) -> list[Any]:
    """In the order of their slots, as far as dependencies allow."""
    number = {n: i for i, n in enumerate(nodes)}
    waits_for = {n: len(sources) for n, sources in needs.items()}
    ready = [(slot[n], number[n], n) for n in nodes if not waits_for[n]]
    heapq.heapify(ready)
    out = []
    while ready:
        _, _, node = heapq.heappop(ready)
        out.append(node)
        for reader in readers[node]:
            waits_for[reader] -= 1
            if not waits_for[reader]:
                heapq.heappush(ready, (slot[reader], number[reader], reader))
    assert len(out) == len(nodes), "transfers and kernels depend on each other in a circle"
    return out
