"""The linear program's view of a prepared graph: activations, the bytes that stay, and problems for sets of anchors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch.fx as fx

from memo_compile.passes.analysis.liveness import last_reads, lifetimes
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.facts import (
    draws_from_seed,
    is_dense,
    is_view,
    nbytes,
    storage_of,
)
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.transforms.refetches import unread_ranges
from memo_compile.planning import residency
from memo_compile.planning.anchors import anchor_sets, bottlenecks, first_needed
from memo_compile.planning.prepared import Prepared, results_of, step_seconds, tangents_of

SMALL = 16 * 1024  # bytes: below that an activation stays; moving it costs more than its room is worth


@dataclass(frozen=True)
class Limits:
    """What the plan may use, in bytes and seconds. `budget` is None for no limit, `slice_tokens` 0 for automatic.

    Other graphs of the step hold `beside` bytes, which `budget` leaves out, and `host_beside` on the host, which `host`
    leaves out. Where it is not `promised`, the least that
    there is will do. At most `calls` of the graph are between their forward and their backward at once: budget and host
    memory are for all of them. `tiles` is in how many tiles the widest regions run, 1 for none; "auto": few. They are
    around values of at least `wide` bytes; 0: a part of the widest. In low precision they add up in `accumulate`.
    """

    budget: int | None
    host: int
    offload: bool | Literal["all"] = True
    recompute: bool = True
    slice_tokens: int = 0
    time_limit: float = 10.0
    objective: Literal["time", "memory"] = "time"
    beside: int = 0
    promised: bool = True
    calls: int = 1
    host_beside: int = 0
    tiles: int | Literal["auto"] = 1
    wide: int = 0
    accumulate: Literal["float32", "same"] = "float32"

    @property
    def host_in_all(self) -> int:
        """Bytes of host memory that all graphs together may use."""
        return self.host + self.host_beside

    def given(self, peak: int) -> int | None:
        """The budget of a plan that holds `peak` bytes: it is given what it needs where nothing was promised."""
        return None if self.budget is None else max(self.budget, peak)


@dataclass(frozen=True)
class View:
    """The linear program's view of a prepared graph: the problem for one set of anchors can be made from it."""

    order: tuple[str, ...]
    activations: Mapping[str, residency.Activation]
    needs: Mapping[str, tuple[str, ...]]
    axes: Mapping[str, TokenAxis | None]
    problem: residency.Problem  # without activations


def view_of(p: Prepared, limits: Limits, free: frozenset[str] = frozenset()) -> View:
    """The view of a prepared graph, as if the values in `free`, by name, took no memory."""
    front_nodes, back_nodes = list(p.forward.graph.nodes), list(p.backward.graph.nodes)
    steps = len(front_nodes)
    results = results_of(p.forward, p.num_forward_outputs)
    held = sum(nbytes(n) for n in results if n.op != "placeholder")
    movable = {name: node for name, node in _movable(p, results).items() if name not in free}
    names = frozenset(n.name for n in p.saved)
    fixed = names - frozenset(movable) - {n.name for n in results} - {n.name for n in p.saved if n.op == "placeholder"}
    front = lifetimes(p.forward, fused=p.fused)
    back = lifetimes(p.backward, fused=p.fused, owned_inputs=names | tangents_of(p.backward))
    base = front.live_bytes(skip=frozenset(movable) | free)
    base += [b + held for b in back.live_bytes(skip=(names - fixed) | free)]
    staying = [n for n in p.saved if n.name in fixed - free and storage_of(n) is n]
    of_others = (limits.calls - 1) * (held + sum(map(nbytes, staying)))
    seconds = [step_seconds(p, n) for n in (*front_nodes, *back_nodes)]
    reads = last_reads(p.forward, fused=p.fused, ignore_output=True)
    born = {n.name: i for i, n in enumerate(front_nodes)}
    first_read, unread = _first_reads(p.backward), unread_ranges(p.backward)
    activations = {}
    axes: dict[str, TokenAxis | None] = {}
    for name, node in movable.items():
        info: TokenInfo | None = node.meta.get(TOKENS)
        axis = info.axis if info is not None and info.axis.tokens > 1 else None
        axes[name] = axis
        must_leave = bool(limits.offload) and name in p.policies.offloaded
        chain = p.chains[name] if limits.recompute and not must_leave else None
        activations[name] = residency.Activation(
            name=name,
            bytes=nbytes(node),
            tokens=axis.tokens if axis is not None else 1,
            produced=born[name],
            last_forward=reads.get(name, born[name]),
            first_backward=steps + first_read.get(name, 0),
            last_backward=steps + max(back.ranges[name].end - 1, 0) if name in back.ranges else steps,
            recompute_seconds=None if chain is None else sum(p.seconds.get(n.name, 0.0) for n in chain),
            can_offload=bool(limits.offload),
            can_stay=not must_leave,
            recompute_whole=axis is not None and not _recomputed_by_rows(info, chain),
            unread=tuple((steps + begin, steps + end) for begin, end in unread.get(name, ())),
        )
    problem = residency.Problem(
        seconds=tuple(seconds),
        base_bytes=tuple(b + of_others for b in base),
        forward_steps=steps,
        activations=(),
        budget=limits.budget,
        host_budget=limits.host // limits.calls,
        d2h=p.profile.d2h,
        h2d=p.profile.h2d,
        slice_tokens=limits.slice_tokens or max(1, p.tokens.tokens // 64),
        calls=limits.calls,
    )
    needs = {name: _needs(p.chains[name], movable) for name in movable}
    return View(order=tuple(movable), activations=activations, needs=needs, axes=axes, problem=problem)


def _recomputed_by_rows(info: TokenInfo | None, chain: tuple[fx.Node, ...] | None) -> bool:
    """Whether rows alone can be recomputed. A draw is a function of the place in the whole: a row of it costs all."""
    return info is not None and info.sliceable and not any(draws_from_seed(n) for n in chain or ())


def _movable(p: Prepared, results: set[fx.Node]) -> dict[str, fx.Node]:
    """Saved values that can leave: memo's own storage, dense, no other's, and large enough to be worth it."""
    storages = [storage_of(n) for n in p.saved]
    result_names = {n.name for n in results}
    made = {n.name for n in p.forward.graph.nodes}  # not by these names what a tiled region makes in another layout
    return {
        n.name: n
        for n in p.saved
        if n.op != "placeholder"
        and n.name in made
        and (nbytes(n) >= SMALL or n.name in p.policies.offloaded)
        and n.name not in p.policies.saved
        and storage_of(n) is n
        and storages.count(n) == 1
        and n.name not in result_names
        and is_dense(n)
    }


def _first_reads(backward: fx.GraphModule) -> dict[str, int]:
    """The step of the first reader of each input of the backward, views followed."""
    first: dict[str, int] = {}
    for step, node in enumerate(backward.graph.nodes):
        if node.op == "call_function" and not is_view(node):
            for argument in node.all_input_nodes:
                first.setdefault(storage_of(argument).name, step)
    return first


def _needs(chain: tuple[fx.Node, ...] | None, movable: Mapping[str, fx.Node]) -> tuple[str, ...]:
    inside = set(chain or ())
    found = {a.name for n in inside for a in n.all_input_nodes if a not in inside and a.name in movable}
    return tuple(sorted(found))


def problems_of(view: View) -> list[residency.Problem]:
    """One problem for each set of anchors worth a try."""
    remakable = {name for name, a in view.activations.items() if a.recompute_seconds is not None}
    nbytes_of = {name: a.bytes for name, a in view.activations.items()}
    first = {name: a.first_backward for name, a in view.activations.items()}
    found = bottlenecks(view.order, view.needs, nbytes_of)
    sets = anchor_sets(found, view.order) if remakable else [frozenset(view.order)]
    problems = []
    for anchors in sets:
        needed = first_needed(view.order, first, view.needs, remakable - anchors)
        activations = tuple(
            replace(a, first_backward=needed[name], recompute_seconds=None if name in anchors else a.recompute_seconds)
            for name, a in view.activations.items()
        )
        problems.append(replace(view.problem, activations=activations))
    return problems
