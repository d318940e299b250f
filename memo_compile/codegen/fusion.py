"""Keeps what a matrix product reads last from living on in a kernel that runs later.

Inductor fuses elementwise values that read the same tensors. Where one is made for a product (what a linear layer's
weight gradient is computed from, remade in the backward) and another comes behind that product (the gradients that flow
on), one kernel makes both before the product runs, and all they read and write is live at once: for a gated MLP six
tensors of its width in place of four. So what the graph has behind a product waits for it.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `config._pre_fusion_custom_pass`; of the scheduler
`topological_sort_schedule` and `compute_ancestors`; of its nodes `add_fake_dep`, `unmet_dependencies`, `read_writes`,
`get_outputs` and a buffer's `users`; `WeakDep`.
"""

from __future__ import annotations

from typing import Any

from memo_compile.codegen.order import node_index, positions

SMALL = 2**18  # bytes: below that a kernel of its own costs more than it saves


def wait_for_products(nodes: list[Any]) -> list[Any]:
    """Of scheduler nodes before fusion: what reads the same as a product's operand, and comes behind it, waits."""
    from torch._inductor.dependencies import WeakDep

    index = node_index()
    at = {n: max(positions(n, index), default=-1) for n in nodes}
    makers = {name: n for n in nodes for name in n.get_buffer_names()}
    kernels = [n for n in nodes if type(n).__name__ == "SchedulerNode"]
    fusible = set(kernels)
    readers: dict[str, list[Any]] = {}
    for n in kernels:
        for name in {d.name for d in n.read_writes.reads}:
            readers.setdefault(name, []).append(n)
    changed = False
    for operand in kernels:
        product = _last_product(operand, at)
        if product is None:
            continue
        read = {d.name for d in operand.read_writes.reads}
        # What one kernel would make for both need not be in memory: of two kernels it would have to.
        joined = {r for name in read if makers.get(name) in fusible for r in readers[name]}
        beside = {r for name in read for r in readers.get(name, ())} - joined
        for later in sorted((n for n in beside if at[n] > at[product]), key=lambda n: at[n]):
            if not _needs(product, later, makers):
                # Named by its operation, as Inductor's own ordering does: it writes over nothing.
                later.add_fake_dep(WeakDep(product.get_outputs()[0].get_name(), later.get_name(), is_fake=True))
                changed = True
    if not changed:
        return nodes
    scheduler = kernels[0].scheduler
    scheduler.nodes = scheduler.topological_sort_schedule(nodes)
    scheduler.compute_ancestors()
    return list(scheduler.nodes)


def _needs(node: Any, other: Any, makers: dict[str, Any]) -> bool:
    """Whether `node` cannot run before `other` has."""
    stack, seen = [node], {node}
    while stack:
        for dependency in stack.pop().unmet_dependencies:
            maker = makers.get(dependency.name)
            if maker is other:
                return True
            if maker is not None and maker not in seen:
                seen.add(maker)
                stack.append(maker)
    return False


def _last_product(operand: Any, at: dict[Any, int]) -> Any:
    """The product, or other kernel of torch's own, that reads a large value last, if such kernels alone do."""
    outputs = operand.get_outputs()
    if sum(_nbytes(b) for b in outputs) < SMALL:
        return None
    users = [use.node for b in outputs for use in b.users]
    if not users or any(type(u).__name__ != "ExternKernelSchedulerNode" for u in users):
        return None
    return max(users, key=lambda u: at[u])


def _nbytes(buffer: Any) -> int:
    node = buffer.node
    elements = 1
    for size in node.get_size():
        elements *= int(size)
    return elements * int(node.get_dtype().itemsize)
