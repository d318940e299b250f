"""The problem, and its answer: how much of each saved activation is kept, offloaded, recomputed. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from memo_compile.passes.transforms.residency import Residency
from memo_compile.schema import Binding


@dataclass(frozen=True)
class Activation:
    """One saved activation. Steps are indices on the timeline; `tokens` = 1 means that it has one home, whole.

    `first_backward` is the first step that needs it, be it for a gradient or to recompute another activation.
    `recompute_seconds` is None where it must not be recomputed; with `recompute_whole` it is recomputed whole or not
    at all, while its rows may be kept and offloaded in slices. With `can_stay` false none of it is kept. `unread` are
    half-open ranges of steps of the backward, between reads of it.
    """

    name: str
    bytes: int
    tokens: int
    produced: int
    last_forward: int
    first_backward: int
    last_backward: int
    recompute_seconds: float | None
    can_offload: bool = True
    recompute_whole: bool = False
    can_stay: bool = True
    unread: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Problem:
    """`seconds` and `base_bytes` per step; `base_bytes` is live whatever is decided. Rates in bytes/s.

    One of `calls` is played: the others have run their forward, and hold what the decision keeps. The activations of
    each tuple of `alike` have one home, by name. With `again`, what is offloaded takes no room while it is unread, and
    comes once more: the least memory, for more copies.
    """

    seconds: tuple[float, ...]
    base_bytes: tuple[int, ...]
    forward_steps: int
    activations: tuple[Activation, ...]
    budget: int | None
    host_budget: int
    d2h: float
    h2d: float
    slice_tokens: int = 1
    calls: int = 1
    alike: tuple[tuple[str, ...], ...] = ()
    again: bool = False

    def away(self, a: Activation) -> tuple[tuple[int, int], ...]:
        """The ranges of steps in which `a` takes no room, where all of it is offloaded."""
        return a.unread if self.again else ()


@dataclass(frozen=True)
class Decision:
    """The program's answer.

    `seconds` is the predicted step, `peak` the least memory in which it takes no longer, transfers included. `prices`
    are the duals: the seconds that one more GiB of memory or one more GB/s of a link would save. `binding` is the one
    that costs most in proportion: price times what there is.
    """

    residency: dict[str, Residency]
    peak: int
    seconds: float
    stall_seconds: float
    recompute_seconds: float
    binding: Binding
    prices: Mapping[Binding, float]
    solver_seconds: float


def memory_profile(problem: Problem, residency: Mapping[str, Residency]) -> list[int]:
    """Bytes live at each step under `residency`, transfers taken to be instantaneous."""
    steps = len(problem.seconds)
    change = np.zeros(steps + 1)
    for a in problem.activations:
        gone = a.bytes * (1 - residency[a.name].kept / a.tokens)
        change[0] += (problem.calls - 1) * (a.bytes - gone)
        change[a.produced] += a.bytes
        change[min(a.last_forward + 1, steps)] -= gone
        change[min(max(a.first_backward, a.last_forward + 1), steps)] += gone
        change[min(a.last_backward + 1, steps)] -= a.bytes
        for begin, end in problem.away(a) if residency[a.name].offloaded == a.tokens else ():
            change[begin] -= a.bytes
            change[end] += a.bytes
    return [int(v) for v in np.cumsum(change[:-1]) + np.array(problem.base_bytes)]


def with_budget(problem: Problem, budget: int | None) -> Problem:
    """The same problem under another budget."""
    return replace(problem, budget=budget)
