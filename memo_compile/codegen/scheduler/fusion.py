"""Keeps what a matmul reads last from living on in a kernel that runs later.

Inductor fuses elementwise ops that read the same tensors. Say one makes the operand of a matmul (for a linear layer's
weight gradient, recomputed in the backward) and another stands after that matmul (the gradients that flow on). One
kernel then makes both before the matmul runs, and all that they read and write is live at once: for a gated MLP six
tensors of its width in place of four. So kernels that the graph has after a matmul wait for it.

The same holds where kernels of two layers read one value, such as a mask for all attentions: fused, they would make
both layers' values where the first is needed, and the second layer's would be live until its turn. So of two kernels
that read the same and work on large values, with a matmul between them, the second waits until the first one's are
read.

And a partial sum (`memo_compile.passes.transforms.sums`) runs before the next matmul, and before the next term is
computed: fused with a kernel after that, it would hold its terms, or what they are reductions of, until then.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `config._pre_fusion_custom_pass`; of the scheduler
`topological_sort_schedule` and `compute_ancestors`; of its nodes `add_fake_dep`, `unmet_dependencies`, `read_writes`,
`get_outputs` and a buffer's `users`; `WeakDep`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from memo_compile.codegen.emitted.numbers import number_of
from memo_compile.codegen.scheduler.order import node_index, positions
from memo_compile.passes.transforms.sums import is_partial

SMALL = 2**18  # bytes: below that a kernel of its own costs more than it saves


def wait_for_matmuls(nodes: list[Any]) -> list[Any]:
    """Of scheduler nodes before fusion: what reads the same as another, and comes after a matmul, waits."""
    from torch._inductor.dependencies import WeakDep  # loads Inductor

    seen = _Seen.of(nodes)
    changed = False
    for last, later in [*_after_their_operands(seen), *_one_after_the_other(seen), *_before_the_next_matmul(seen)]:
        if not _needs(last, later, seen.makers):
            # Named by its operation, as Inductor's own ordering does: it writes over nothing.
            later.add_fake_dep(WeakDep(last.get_outputs()[0].get_name(), later.get_name(), is_fake=True))
            changed = True
    if not changed:
        return nodes
    scheduler = nodes[0].scheduler
    scheduler.nodes = scheduler.topological_sort_schedule(nodes)
    scheduler.compute_ancestors()
    return list(scheduler.nodes)


@dataclass(frozen=True)
class _Seen:
    """A graph's nodes: where each stands in the graph, what makes a buffer, and the kernels that read it."""

    at: dict[Any, int]
    makers: dict[str, Any]
    reads: dict[Any, set[str]]
    readers: dict[str, list[Any]]

    @classmethod
    def of(cls, nodes: list[Any]) -> _Seen:
        index = node_index()
        at = {n: max(positions(n, index), default=-1) for n in nodes}
        makers = {name: n for n in nodes for name in n.get_buffer_names()}
        kernels = [n for n in nodes if type(n).__name__ == "SchedulerNode"]
        reads = {n: {d.name for d in n.read_writes.reads} for n in kernels}
        readers: dict[str, list[Any]] = {}
        for n in sorted(kernels, key=at.__getitem__):
            for name in reads[n]:
                readers.setdefault(name, []).append(n)
        return cls(at, makers, reads, readers)

    def fused_away(self, name: str) -> bool:
        """Whether a kernel makes this: one kernel for its readers need not put it in memory, two would have to."""
        return self.makers.get(name) in self.reads

    def touched(self, node: Any) -> int:
        """Bytes of what a kernel makes, and reads of what others make."""
        given = [self.makers[name] for name in self.reads[node] if name in self.makers]
        return _bytes_of(node) + sum(map(_bytes_of, given))


def _after_their_operands(seen: _Seen) -> Iterator[tuple[Any, Any]]:
    """The matmul that reads a large value last, and a kernel that comes after it and reads what made the value."""
    for operand, read in seen.reads.items():
        readers = _readers(operand)
        if not readers or _bytes_of(operand) < SMALL or not all(map(_is_matmul, readers)):
            continue
        matmul = max(readers, key=seen.at.__getitem__)
        joined = {r for name in read if seen.fused_away(name) for r in seen.readers[name]}
        beside = {r for name in read for r in seen.readers.get(name, ())} - joined
        for later in sorted(beside, key=seen.at.__getitem__):
            if seen.at[later] > seen.at[matmul]:
                yield matmul, later


def _one_after_the_other(seen: _Seen) -> Iterator[tuple[Any, Any]]:
    """Of two kernels that read one thing: the last that reads what the first makes, and the second, a matmul on."""
    matmuls = sorted(at for n, at in seen.at.items() if _is_matmul(n))
    for name, readers in seen.readers.items():
        if seen.fused_away(name) and _bytes_of(seen.makers[name]) >= SMALL:
            continue
        large = [n for n in readers if seen.touched(n) >= SMALL]
        for first, second in pairwise(large):
            last = max((r for r in [first, *_readers(first)] if r in seen.at), key=seen.at.__getitem__)
            matmul = bisect.bisect_right(matmuls, seen.at[last])
            if matmul < len(matmuls) and matmuls[matmul] < seen.at[second]:
                yield last, second


def _before_the_next_matmul(seen: _Seen) -> Iterator[tuple[Any, Any]]:
    """A partial sum, and the first matmul after it; and the first of those that the next partial sum needs.

    Without the second a sum of reductions could wait, together with matmuls that nothing but the result needs.
    """
    matmuls = sorted((n for n in seen.at if _is_matmul(n)), key=seen.at.__getitem__)
    places = [seen.at[p] for p in matmuls]
    for kernel in seen.reads:
        following = matmuls[bisect.bisect_right(places, seen.at[kernel]) :]
        if following and any(is_partial(o) for o in kernel.node.get_origins()):
            yield kernel, following[0]
            readers = [r for r in _readers(kernel) if r in seen.reads]
            needed = (m for m in following if any(_needs(r, m, seen.makers) for r in readers))
            yield from ((kernel, m) for m in islice(needed, 1))


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


def _readers(node: Any) -> list[Any]:
    return [use.node for buffer in node.get_outputs() for use in buffer.users]


def _is_matmul(node: Any) -> bool:
    """Whether it is a matmul, or another kernel of torch's own."""
    return type(node).__name__ == "ExternKernelSchedulerNode"


def _bytes_of(node: Any) -> int:
    """Bytes of what a node makes."""
    return sum(_nbytes(buffer) for buffer in node.get_outputs())


def _nbytes(buffer: Any) -> int:
    """Bytes of a tensor; 0 for what stands for several results, or for none."""
    if not buffer.node.has_tensor_output():
        return 0
    elements = math.prod(number_of(size) for size in buffer.node.get_size())
    return elements * int(buffer.node.get_dtype().itemsize)
