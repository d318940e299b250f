"""The closed loop: plan, look at what the plan really holds, and lower the target by more than the excess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from memo_compile.errors import BudgetTooSmall
from memo_compile.logs import logger
from memo_compile.planning.decide import Decided
from memo_compile.planning.prepared import Prepared, held_between
from memo_compile.planning.problem import Limits
from memo_compile.planning.search import least_peak
from memo_compile.planning.tiling import TILES, tiled, wide_in, wide_values, widest_of, with_tiles

log = logger(__name__)

ROUNDS = 2  # with the smallest plan as the third
OVERSHOOT = 2.5  # of the excess: a smaller plan misses by more than the one before, up to twice as much (HF GPT-2)
AIM = 0.985  # of a budget, at first, where a compiler fuses: plans miss by about a hundredth, and a round takes seconds
WORTHWHILE = (
    0.7  # of the unplanned peak by the model, up to 1.22 times the emitted graph's: plans below need no comparison
)
TRIFLE = 1e-3  # of a step's budget: a graph after a graph break may be a few bytes
CLEARLY = 0.97  # of a least peak: more tiles than that need are not worth it
IN_THE_WAY = 0.1  # of a least peak: where the widest value is less, other things bind, and there are no tiles
LEAST_ROWS = 16  # of a tile: matmuls of fewer rows are slow
MATTERS = 2**20  # bytes
MISSED = 1.02  # of a predicted peak
MISJUDGED = 0.1  # of a predicted peak, either way: fewer tiles may hold less then, whatever the model says
LESS = 0.95  # of what the smallest plan is found to hold
IN_VAIN = 2  # numbers of tiles without a gain, before no more are tried
LEVELS = 2  # of what is wide: what is widest at first, and what is once that runs in tiles
T = TypeVar("T")
Decide = Callable[[Limits], Decided]
Evaluate = Callable[[Decided], tuple[int, T]]


@dataclass(frozen=True)
class Fitted(Generic[T]):
    """A plan with what it was found to hold: `peak` bytes, and the evidence for it."""

    decided: Decided
    peak: int
    evidence: T
    rounds: int


def fit_budget(p: Prepared, limits: Limits, decide: Decide, evaluate: Evaluate[T]) -> Fitted[T]:
    """The fastest plan that `evaluate` finds within `limits.budget`.

    Args:
        decide: makes the plan for given limits (`planning.decide.decide`).
        evaluate: the bytes that the graphs of a plan hold at most, and what tells so.

    Where not even the smallest plan is within a budget that is not promised, that plan.

    Raises:
        BudgetTooSmall: not even the smallest plan is within the budget.
    """
    if limits.tiles == "auto":
        return _with_few_tiles(p, limits, decide, evaluate)
    p = with_tiles(p, limits)
    fitted = _fitted(p, limits, decide, evaluate)
    least = fitted.peak if limits.objective == "memory" else min(fitted.peak, least_peak(p, limits))
    plan = replace(fitted.decided.plan, least_peak=least)
    return replace(fitted, decided=replace(fitted.decided, plan=plan))


def _with_few_tiles(p: Prepared, limits: Limits, decide: Decide, evaluate: Evaluate[T]) -> Fitted[T]:
    """No tiles where the budget is kept without; else the fewest with which it is."""

    def fitted(tiles: int, wide: int = 0) -> Fitted[T]:
        return fit_budget(p, replace(limits, tiles=tiles, wide=wide), decide, evaluate)

    if limits.objective == "memory":
        ladder = _worthwhile(p, limits)
        least = fitted(*(ladder[-1] if ladder else (1,)))
        predicted = least.decided.plan.predicted_peak
        if len(ladder) > 1 and abs(least.peak - predicted) > MISJUDGED * predicted:
            least = min(least, fitted(*ladder[-2]), key=lambda f: f.peak)
        if ladder and least.peak > least_peak(p, replace(limits, tiles=1)):  # more than the model said
            return min(least, fitted(1), key=lambda f: f.peak)
        return least
    refused: BudgetTooSmall | None = None
    try:
        found = fitted(1)
        if limits.budget is None or found.peak <= limits.budget or trifling(found.peak, limits):
            return found
    except BudgetTooSmall as error:
        refused = error
    ladder = _worthwhile(p, limits)
    if not ladder and refused is not None:
        raise refused
    for rung in ladder:
        try:
            found = fitted(*rung)
        except BudgetTooSmall:
            if rung == ladder[-1]:
                raise
            continue
        if limits.budget is None or found.peak <= limits.budget:
            break
    return found


def _worthwhile(p: Prepared, limits: Limits) -> list[tuple[int, int]]:
    """Numbers of tiles and bytes of what is wide, each with a least peak that is clearly below the one before.

    By the model. Once the widest values do not bind, those do that are widest then; where tiles of the first still
    bind, that is seen with more of these.
    """
    found: list[tuple[int, int]] = []
    if limits.offload == "all" or widest_of(p) < MATTERS:
        return []
    counts: tuple[int, ...] = TILES
    clear = finest = (p, least_peak(p, replace(limits, tiles=1)))
    for _ in range(LEVELS):
        least = clear[1]
        enough = max(MATTERS, (1 - CLEARLY) * least)
        for now, peak in (clear, finest):
            if widest_of(now) < max(MATTERS, IN_THE_WAY * peak):
                return found
            wide, in_vain = wide_in(now), 0
            spared = peak - least_peak(now, replace(limits, tiles=1), wide_values(now))  # by tiles without end
            if spared >= enough:
                break
        for count in counts:
            if (1 - 1 / count) * spared < enough:
                continue
            cut = tiled(p, count, wide, limits.accumulate) if count * LEAST_ROWS <= p.tokens.tokens else None
            peak = least_peak(cut, limits) if cut is not None else least
            if cut is not None and peak < finest[1]:
                finest = cut, peak
            if cut is not None and peak <= CLEARLY * least and least - peak >= MATTERS:
                clear, least, counts, in_vain = (cut, peak), peak, tuple(c for c in TILES if c >= count), 0
                found.append((count, wide))
            elif cut is None or (in_vain := in_vain + 1) == IN_VAIN:
                break
    return found


def _fitted(p: Prepared, limits: Limits, decide: Decide, evaluate: Evaluate[T]) -> Fitted[T]:
    if limits.objective == "memory":
        return Fitted(*_smallest(p, limits, decide, evaluate), rounds=1)
    target = limits.budget
    if p.fused and target is not None and target < p.unplanned_peak:
        target = int(AIM * target)
    rounds, least = 0, None
    for rounds in range(1, ROUNDS + 1):
        decided, peak, evidence = _looked_at(replace(limits, budget=target), decide, evaluate)
        if limits.budget is None or peak <= limits.budget:
            return Fitted(decided, peak, evidence, rounds)
        name = decided.plan.name
        log.debug("%s: the plan for %s bytes holds %s, over a budget of %s", name, target, peak, limits.budget)
        assert target is not None
        target = max(1, min(target, decided.plan.predicted_peak) - int(OVERSHOOT * (peak - limits.budget)))
        if not decided.overlap:  # no plan keeps the target, and this is the smallest: a lower one gives it once more
            least = decided, peak, evidence
            break
    decided, peak, evidence = _smallest(p, limits, decide, evaluate, least)
    if limits.budget is not None and peak > limits.budget and limits.promised and not trifling(peak, limits):
        raise BudgetTooSmall(limits.budget, peak, decided.peak_tensors, limits.beside)
    return Fitted(decided, peak, evidence, rounds + 1)


def trifling(peak: int, limits: Limits) -> bool:
    """Whether so few bytes do not matter to the step's budget, whoever holds the rest of it."""
    return limits.budget is not None and peak <= TRIFLE * (limits.budget + limits.beside)


def _smallest(
    p: Prepared,
    limits: Limits,
    decide: Decide,
    evaluate: Evaluate[T],
    known: tuple[Decided, int, T] | None = None,
) -> tuple[Decided, int, T]:
    """The plan that holds least: of a small graph that may be the unplanned one, which a compiler fuses further.

    Args:
        known: the smallest plan that moves anything, where it was looked at before.
    """
    least = known or _looked_at(replace(limits, objective="memory"), decide, evaluate)
    if limits.offload == "all" or least[1] <= WORTHWHILE * p.unplanned_peak:
        return least
    least = _looked_around(least, limits, decide, evaluate)
    unplanned = _looked_at(replace(limits, budget=None, objective="time", offload=False), decide, evaluate)
    # Of equal peaks, what holds less between the forward and the backward: other graphs of the step run then.
    if (least[1], held_between(least[0].forward)) <= (unplanned[1], held_between(unplanned[0].forward)):
        return least
    return replace(unplanned[0], peak_tensors=least[0].peak_tensors), *unplanned[1:]


def _looked_around(
    least: tuple[Decided, int, T], limits: Limits, decide: Decide, evaluate: Evaluate[T]
) -> tuple[Decided, int, T]:
    """Where the smallest plan holds more than was predicted, one that is to hold a little less; so on while it does.

    The least by the program is not the least as emitted then.
    """
    while least[1] > MISSED * least[0].plan.predicted_peak:
        aimed = replace(limits, budget=int(LESS * least[1]), objective="time")
        found = _looked_at(aimed, decide, evaluate)
        if found[1] >= least[1]:
            break
        least = replace(found[0], limits=limits, plan=replace(found[0].plan, budget=limits.budget)), *found[1:]
    return least


def _looked_at(limits: Limits, decide: Decide, evaluate: Evaluate[T]) -> tuple[Decided, int, T]:
    decided = decide(limits)
    return (decided, *evaluate(decided))
