"""Gives kernels back the dependencies that Inductor loses when it fuses them.

On the CPU fusion computes anew what a kernel reads, from its loops (`recompute_size_and_body`, torch/_inductor/
scheduler.py). Loops know which buffer they read, not that something has written into it since: the kernel's dependency
on the wait for a copy, or on attention that wrote in place, falls back to one on the buffer itself, and the kernel may
run before. torch 2.11 loses added waits as well, 2.13 the renames alone, 2.15 neither.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `config._post_fusion_custom_pass`; of scheduler nodes
`get_nodes`, `read_writes`, `mutation_renames`, `set_read_writes` and `add_fake_dep`; `refresh_group_node_dependencies`;
of the scheduler `topological_sort_schedule`.
"""

from __future__ import annotations

from typing import Any

from memo_compile.errors import EmittedOrderChanged

Waits = dict[str, list[Any]]  # by the name of a kernel's operation, the dependencies that no loop shows


def added_waits(nodes: list[Any]) -> Waits:
    """Of scheduler nodes before fusion: what only orders them."""
    from torch._inductor.dependencies import WeakDep  # loads Inductor

    return {n.get_name(): [d for d in n.read_writes.reads if isinstance(d, WeakDep)] for n in nodes}


def restored(nodes: list[Any], waits: Waits) -> list[Any]:
    """Scheduler nodes after fusion, with all dependencies, and in an order that keeps them.

    Raises:
        EmittedOrderChanged: there is none: without a dependency, Inductor has fused what must not be one kernel.
    """
    from torch._inductor.scheduler import SchedulerNode, refresh_group_node_dependencies  # loads Inductor

    changed = False
    for node in nodes:
        lost = [n for n in node.get_nodes() if isinstance(n, SchedulerNode) and _restore(n, waits)]
        if lost and lost != [node]:
            refresh_group_node_dependencies(node)
        changed = changed or bool(lost)
    if not changed:
        return nodes
    ordered = list(nodes[0].scheduler.topological_sort_schedule(nodes))
    check_dependencies(ordered)
    return ordered


def check_dependencies(nodes: list[Any]) -> None:
    """Every scheduler node stands after all that it needs.

    Raises:
        EmittedOrderChanged: naming the first that does not.
    """
    to_come = {name for node in nodes for name in node.get_buffer_names()}
    for node in nodes:
        to_come -= node.get_buffer_names()
        early = sorted(d.name for d in node.unmet_dependencies if d.name in to_come)
        if early:
            raise EmittedOrderChanged(
                f"{node.get_name()} stands before {early[0]}, which it needs. This is a mistake in memo: please report "
                "it with a dump (dump=...). offload=False avoids it."
            )


def _restore(node: Any, waits: Waits) -> bool:
    """Whether anything was lost."""
    before = {d.name for d in node.read_writes.reads}
    node.set_read_writes(node.read_writes.rename(node.mutation_renames))
    for wait in waits.get(node.get_name(), ()):
        if wait not in node.read_writes.reads:
            node.add_fake_dep(wait)
    return {d.name for d in node.read_writes.reads} != before
