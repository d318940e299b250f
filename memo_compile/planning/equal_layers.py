"""Equal layers get equal homes where that costs next to nothing: their slices are of one size, and share kernels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from memo_compile.errors import SolverOutOfTime
from memo_compile.passes.analysis.layers import LayerInfo
from memo_compile.planning import rounding
from memo_compile.planning.residency import Activation, Decision, Problem

COST = 0.005  # of the step, at most
FEWEST = 4  # layers: of fewer, no compilation gets shorter


def with_equal_layers(
    problem: Problem, decision: Decision, layers: Mapping[str, LayerInfo], *, time_limit: float = 10.0
) -> Decision:
    """The fastest decision that has one home for each place in layers of a class, or the one that was given.

    Args:
        problem: what `decision` answers.
        layers: the layer of each activation that has one, by name.
    """
    alike = _alike(problem, layers)
    if all(len({decision.residency[name] for name in names}) == 1 for names in alike):
        return decision
    with suppress(SolverOutOfTime):
        found = rounding.decide(replace(problem, alike=alike), time_limit=time_limit)
        if found is not None and found.seconds <= (1 + COST) * decision.seconds:
            return replace(found, binding=decision.binding, prices=decision.prices)
    return decision


def _alike(problem: Problem, layers: Mapping[str, LayerInfo]) -> tuple[tuple[str, ...], ...]:
    """Activations of one place in several layers to which the same may be done."""
    groups: dict[object, list[str]] = {}
    for a in problem.activations:
        if a.name in layers:
            info = layers[a.name]
            groups.setdefault((info.cls, info.position, _what_may_be_done(a)), []).append(a.name)
    return tuple(tuple(names) for names in groups.values() if len(names) >= FEWEST)


def _what_may_be_done(a: Activation) -> tuple[object, ...]:
    return a.bytes, a.tokens, a.recompute_seconds is None, a.can_offload, a.recompute_whole, a.can_stay
