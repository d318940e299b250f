"""Keeps the order of transfers through Inductor, and checks it in the emitted text.

Inductor emits an elementwise value where it is first needed in memory, and fuses it with others, while transfers stand
where they were: by the time code comes out, every wait may stand before the computation that it should overlap with. So
behind fusion the transfers are put where the plan has them, among the kernels as they then are. What is emitted is read
back and compared: `EmittedOrderChanged` where it is not the plan.

Private torch APIs, tried with torch 2.13: `config._post_fusion_custom_pass`, scheduler nodes' `unmet_dependencies`,
`get_buffer_names`, `get_nodes`, `node.get_origins()`, and the post-grad graph at `V.graph.module.graph`.
"""

from __future__ import annotations

import ast
import heapq
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from memo_compile.codegen.emitted import flatten
from memo_compile.errors import EmittedOrderChanged

STARTS = {"offload": "offload_wait", "prefetch_": "wait_"}
TRANSFERS = frozenset({*STARTS, *STARTS.values()})


@dataclass(frozen=True)
class Step:
    """A transfer at a host offset, or (`offset` None) a computation by its node's name."""

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
        elif node.op == "call_function":
            steps.append(Step(node.name))
    return steps


def transfer_of(node: Any) -> str | None:
    """`offload`, `offload_wait`, `prefetch_` or `wait_` for a node that is one."""
    target = getattr(node, "target", None)
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "memo":
        name = target._schema.name.split("::")[1]
        return name if name in TRANSFERS else None
    return None


def emitted_steps(lines: Sequence[str], origin: Callable[[str], str | None]) -> list[Step]:
    """The order in emitted text: transfers, and kernels of which `origin` knows the node by the buffer they write."""
    text = textwrap.dedent("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    steps = []
    for statement in flatten(ast.parse(text).body):
        if not isinstance(statement, (ast.Expr, ast.Assign)) or not isinstance(statement.value, ast.Call):
            continue
        call = statement.value
        function = ast.unparse(call.func)
        name = function.removeprefix("torch.ops.memo.").removesuffix(".default")
        if name in TRANSFERS and function.startswith("torch.ops.memo."):
            steps.append(Step(name, ast.literal_eval(call.args[2])))
            continue
        written = [k.value.id for k in call.keywords if k.arg == "out" and isinstance(k.value, ast.Name)]
        node = origin(written[0]) if written else None
        if node is not None:
            steps.append(Step(node))
    return steps


def check_order(planned: Sequence[Step], emitted: Sequence[Step]) -> None:
    """Compare the order of an emitted graph with its plan's.

    Transfers must be the plan's, in its order each way, every wait behind its start; and a computation that both know,
    and that the plan puts between a start and its wait, must stand there.

    Raises:
        EmittedOrderChanged: naming the first difference.
    """
    for kinds in (("offload",), ("prefetch_",), tuple(STARTS), tuple(TRANSFERS - set(STARTS))):
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
    place = {step: i for i, step in enumerate(emitted)}
    known = [s for s in planned if s.offset is None and s in place]
    at = {step: i for i, step in enumerate(planned)}
    for start in (s for s in planned if s.name in STARTS and s.offset is not None):
        wait = Step(STARTS[start.name], start.offset)
        if place[wait] < place[start]:
            raise EmittedOrderChanged(f"the {wait} stands before its start.")
        between = [s for s in known if at[start] < at[s] < at[wait]]
        outside = [s for s in between if not place[start] < place[s] < place[wait]]
        if between and len(outside) == len(between):
            raise EmittedOrderChanged(
                f"between start and end of the {start} the plan computes {between[0]} and {len(between) - 1} more, "
                "the emitted code none of them: nothing overlaps with the copy."
            )


def origin_of(buffer: str) -> str | None:
    """The node that a buffer of the graph being emitted was lowered from."""
    from torch._inductor.virtualized import V

    found = V.graph.name_to_buffer.get(buffer)
    node = found.get_origin_node() if found is not None else None
    return node.name if node is not None else None


def place_transfers(nodes: list[Any]) -> list[Any]:
    """Scheduler nodes after fusion, with the transfers where the graph has them.

    Computation keeps its order. A start stands behind the last kernel that the graph has before it; a prefetch's wait
    before the first reader; the wait of an offload behind the last kernel that the graph has before it. Dependencies
    hold whatever the wishes are.
    """
    from torch._inductor.virtualized import V

    graph: Any = V.graph.module.graph
    index = {node.name: i for i, node in enumerate(graph.nodes)}
    moved = [n for n in nodes if _transfer(n) is not None]
    if not moved:
        return nodes
    makers = {name: n for n in nodes for name in n.get_buffer_names()}
    needs = {n: {makers[d.name] for d in n.unmet_dependencies if d.name in makers} - {n} for n in nodes}
    readers: dict[Any, list[Any]] = {n: [] for n in nodes}
    for node, sources in needs.items():
        for source in sources:
            readers[source].append(node)
    landings = {m for n in moved if _transfer(n) == "prefetch_" for m in needs[n] if not _positions(m, index)}
    fixed = [n for n in nodes if n not in landings and _transfer(n) is None]
    slot = {n: float(i) for i, n in enumerate(fixed)}
    last = [-1.0, -1.0]  # of offloads, which one lease chains, and of prefetches, which one link serves
    for node in sorted(moved, key=lambda n: max(_positions(n, index))):
        kind = _transfer(node)
        at = max(_positions(node, index))
        wish = max(
            (slot[n] for n in fixed if (_positions(n, index) or [0])[-1] < at and _positions(n, index)), default=-1
        )
        if kind == "wait_":
            wish = min((slot[r] for r in readers[node] if r in slot), default=wish + 1) - 1
        else:
            way = int(kind == "prefetch_")
            wish = max(wish, last[way])
            last[way] = wish
        slot[node] = wish + 0.5
    _close_up(moved, fixed, readers, index, slot)
    for node in landings:
        slot[node] = min(slot[r] for r in readers[node] if r in slot)
    return _sorted(nodes, needs, readers, slot)


def _close_up(moved: list[Any], fixed: list[Any], readers: Any, index: dict[str, int], slot: dict[Any, float]) -> None:
    """A prefetch that the graph waits for at once starts where its wait has gone: earlier only holds memory."""
    computed = {p for n in fixed for p in _positions(n, index)}
    for node in moved:
        waits = [r for r in readers[node] if _transfer(r) == "wait_"] if _transfer(node) == "prefetch_" else []
        for wait in waits:
            between = range(max(_positions(node, index)) + 1, max(_positions(wait, index)))
            if not computed.intersection(between):
                slot[node] = max(slot[node], slot[wait])


def _transfer(node: Any) -> str | None:
    origins = getattr(getattr(node, "node", None), "op_overload", None)
    if isinstance(origins, torch._ops.OpOverload) and origins.namespace == "memo":
        name = origins._schema.name.split("::")[1]
        return name if name in TRANSFERS else None
    return None


def _positions(node: Any, index: dict[str, int]) -> list[int]:
    """Where in the graph the nodes stand that a scheduler node computes; the last is where it is complete."""
    found = {index[o.name] for n in node.get_nodes() for o in n.node.get_origins() if o.name in index}
    made = [n for n in node.get_nodes() if type(n).__name__ != "NopKernelSchedulerNode"]
    return sorted(found) if made else []


def _sorted(
    nodes: list[Any], needs: dict[Any, set[Any]], readers: dict[Any, list[Any]], slot: dict[Any, float]
) -> list[Any]:
    """In the order of their slots, as far as dependencies allow."""
    number = {n: i for i, n in enumerate(nodes)}
    left = {n: len(sources) for n, sources in needs.items()}
    ready = [(slot[n], number[n], n) for n in nodes if not left[n]]
    heapq.heapify(ready)
    out = []
    while ready:
        _, _, node = heapq.heappop(ready)
        out.append(node)
        for reader in readers[node]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, (slot[reader], number[reader], reader))
    assert len(out) == len(nodes), "transfers and kernels depend on each other in a circle"
    return out
