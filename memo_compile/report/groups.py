"""Saved activations that one source line makes alike, and the shares of their bytes by where these are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from memo_compile.schema import ActivationPlan, Plan


def by_source(plan: Plan) -> list[list[ActivationPlan]]:
    """Activations of one source line, shape and dtype together, in the plan's order."""
    groups: dict[tuple[str, tuple[int, ...], str], list[ActivationPlan]] = defaultdict(list)
    for a in plan.activations:
        groups[a.source, a.shape, a.dtype].append(a)
    return list(groups.values())


def shares(group: Sequence[ActivationPlan]) -> tuple[float, float, float]:
    """The shares of a group's bytes that are kept, offloaded and recomputed."""
    total = sum(a.bytes for a in group) or 1
    kept, offloaded = sum(a.share(a.kept) for a in group), sum(a.share(a.offloaded) for a in group)
    return kept / total, offloaded / total, sum(a.share(a.recomputed) for a in group) / total
