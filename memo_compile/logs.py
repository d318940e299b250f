"""What memo says through `logging`: a summary of each graph, details at DEBUG, and what a user should act on.

In a distributed run only the first rank speaks: all ranks plan the same graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from memo_compile.schema import Binding, Cause, Plan

MIB = 2**20
LARGE = 0.05  # of the saved bytes: below that, what cannot be sliced is not worth a warning


def logger(name: str) -> logging.Logger:
    """The logger of that name, silent on every rank but the first."""
    log = logging.getLogger(name)
    log.addFilter(first_rank)
    return log


def first_rank(_: logging.LogRecord | None = None) -> bool:
    """Whether this process is the first rank, or alone."""
    from torch import distributed  # loads torch

    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0)


def announce(plan: Plan) -> None:
    """Log one plan: a line at INFO, its activations and stops at DEBUG, a warning for each piece of advice."""
    log = logger("memo_compile")
    log.info(summary(plan))
    for a in plan.activations:
        if a.offloaded or a.recomputed:
            log.debug(
                "%s: %s %s, %.2f MiB, of %d rows %d kept, %d offloaded, %d recomputed; %s",
                *(plan.name, a.name, list(a.shape), a.bytes / MIB, a.tokens, a.kept, a.offloaded, a.recomputed),
                a.source,
            )
    for s in plan.stops:
        log.debug("%s: the token axis ends at %s (%s): %s; %s", plan.name, s.node, s.op, s.reason, s.source)
    for line in advice(plan):
        log.warning("%s: %s", plan.name, line)


def summary(plan: Plan) -> str:
    """One line: budget, peak, arena over its lower bound, offloaded, recomputed, seconds."""
    bound = f" ({plan.arena_bytes / plan.lower_bound:.3f} of the lower bound)" if plan.lower_bound else ""
    return (
        f"{plan.name} ({plan.backend}): "
        f"budget {'unlimited' if plan.budget is None else f'{plan.budget / MIB:.1f} MiB'}, "
        f"peak {plan.predicted_peak / MIB:.1f} MiB planned of {plan.unplanned_peak / MIB:.1f} MiB unplanned, "
        f"arena {plan.arena_bytes / MIB:.1f} MiB{bound}, "
        f"offloaded {plan.offloaded_bytes / MIB:.1f} MiB, "
        f"recomputed {plan.recomputed_flops_share:.1%} of the forward, "
        f"planned in {plan.seconds:.1f} s"
    )


def advice(plan: Plan) -> Iterator[str]:
    """What a user may want to change about a plan that pays for its budget."""
    if not plan.offloaded_bytes and not plan.recomputed_bytes:
        return
    saved = sum(a.bytes for a in plan.activations)
    whole = sum(a.bytes for a in plan.activations if a.cause is Cause.NO_TOKEN_AXIS)
    if plan.stops and whole > LARGE * saved:
        stop = plan.stops[0]
        yield (
            f"{whole / MIB:.1f} MiB of saved activations are kept whole, since no token axis reaches them: it ends at "
            f"{stop.op} ({stop.source}): {stop.reason}"
        )
    if plan.binding is Binding.HOST_MEMORY:
        yield "host memory is what limits the plan: raise host_budget to recompute less"
