"""The plan of a prepared graph: made now, from the linear program and dry runs, or one that was kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memo_compile.codegen.caching.plans import KeptPlan, find, kept_plan
from memo_compile.codegen.rehearsal import Evidence, Rehearsal
from memo_compile.logs import logger
from memo_compile.passes.pipeline import Watch
from memo_compile.planning.decide import Decided, decide
from memo_compile.planning.fit_budget import WORTHWHILE, Fitted, fit_budget
from memo_compile.planning.fit_reserved import fit_reserved
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import Limits
from memo_compile.trace.ranks import together
from memo_compile.trace.setting import limits_for

log = logger(__name__)


@dataclass(frozen=True)
class Fit:
    """A plan within `limits`, the rehearsal that showed what it holds, and what is to be kept of it."""

    prepared: Prepared
    rehearsal: Rehearsal
    limits: Limits
    fitted: Fitted[Evidence]
    to_keep: KeptPlan | None = None


def fit_or_find(
    p: Prepared, rehearsal: Rehearsal, restricted: Callable[[Limits], Limits], watch: Watch, key: str | None
) -> Fit:
    """The plan of a joint graph, agreed on by all ranks that run it.

    Args:
        restricted: makes of what ranks agree on the limits of this one.
        watch: as `decide` takes it.
        key: what the plan is kept under; None to read and keep nothing.
    """
    setting = rehearsal.setting
    # What was emitted from a plan that was found has exceeded its budget: it is made anew, and kept in its place.
    kept = find(key) if key is not None and rehearsal.scalar else None
    if kept is not None:
        p = replace(p, unplanned_peak=kept.unplanned_peak)
    else:
        rehearsal, p = _compared(rehearsal, p)
    with together(p.joint) as ranks:
        limits = restricted(ranks.agree(limits_for(setting, p.unplanned_peak)))
        rehearsal = replace(rehearsal, budget=limits.budget)
        if kept is not None and kept.limits == limits:
            log.info("%s: its plan is one that was kept", setting.name)
            found = Fit(p, rehearsal, limits, kept.fitted(p, setting.name))
        else:
            fitted = _fitted(p, limits, rehearsal, watch)
            found = Fit(p, rehearsal, limits, fitted, kept_plan(key, p, limits, fitted) if key is not None else None)
        ranks.confirm(found.fitted.decided)
    return replace(found, rehearsal=replace(rehearsal, unplanned=None))  # what was lowered for it is large


def _compared(rehearsal: Rehearsal, p: Prepared) -> tuple[Rehearsal, Prepared]:
    """Both with what Inductor holds: a ratio is of that; of bytes it is asked only where that may be within them."""
    budget = rehearsal.setting.options.memory_budget
    if isinstance(budget, float) or (isinstance(budget, int) and budget > WORTHWHILE * p.unplanned_peak):
        likely = budget >= (1 if isinstance(budget, float) else p.unplanned_peak)
        rehearsal, unplanned_peak = rehearsal.with_unplanned(p, likely=likely)
        p = replace(p, unplanned_peak=unplanned_peak)
    return rehearsal, p


def _fitted(p: Prepared, limits: Limits, rehearsal: Rehearsal, watch: Watch) -> Fitted[Evidence]:
    """The fastest plan within the budget, of which what is reserved is a part or what is allocated."""
    setting = rehearsal.setting

    def make(limits: Limits) -> Decided:
        setting.progress.step("planning")
        return decide(p, limits, name=setting.name, backend="memo", watch=watch)

    def fit(limits: Limits) -> Fitted[Evidence]:
        return fit_budget(p, limits, make, replace(rehearsal, budget=limits.budget).looked_at)

    if not setting.counts_reserved:
        return fit(limits)
    return fit_reserved(fit, limits, lambda e: e.layout.reserved(setting.allocator))[0]
