"""What else one could do with a stack of layers: the strategies that plans are compared with.

Each gives every activation its homes by a rule, and the simulator plays all of them on the same terms: each may copy
and recompute as well as its rule allows. Where a rule leaves something open, it is set in the strategy's favour.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from memo_compile.errors import InvalidOption
from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning.anchors import first_needed
from memo_compile.planning.residency import Activation, Decision, Problem, memory_profile
from memo_compile.planning.rounding import decide
from memo_compile.planning.simulate import Simulation, simulate
from memo_compile.schema import Binding

SOLVER_SECONDS = 120.0
LAST = 2  # layers at the end of the stack that stay: their slices would come back as soon as they left


@dataclass(frozen=True)
class Stack:
    """A training step of repeated layers.

    `problem.activations` stand in the forward's order, and their `first_backward` is the first use for a gradient.
    `needs` tells what each is made from, `layer` where each belongs, -1 outside the layers. `inputs` are the layers'
    inputs, `attention` what only attention could recompute. `anchors` are sets of activations that a plan might never
    recompute, to be tried.
    """

    problem: Problem
    needs: Mapping[str, tuple[str, ...]]
    layer: Mapping[str, int]
    inputs: frozenset[str]
    attention: frozenset[str]
    anchors: tuple[frozenset[str], ...]

    @property
    def layers(self) -> int:
        """How many there are."""
        return max(self.layer.values(), default=-1) + 1


@dataclass(frozen=True)
class Outcome:
    """A strategy's homes and how they play; `problem` has the first uses that its recomputation makes."""

    problem: Problem
    residency: Mapping[str, Residency]
    played: Simulation
    share: float | None = None  # of the tokens: the paper's alpha
    predicted: Decision | None = None  # by the linear program, where it decided


def recomputing_only(stack: Stack, recomputed: Collection[str]) -> Problem:
    """The problem in which only `recomputed` may be: what they are made from is needed as early as they are."""
    order = [a.name for a in stack.problem.activations]
    first = {a.name: a.first_backward for a in stack.problem.activations}
    needed = first_needed(order, first, stack.needs, recomputed)
    return replace(
        stack.problem,
        activations=tuple(
            replace(
                a,
                first_backward=needed[a.name],
                recompute_seconds=a.recompute_seconds if a.name in recomputed else None,
            )
            for a in stack.problem.activations
        ),
    )


def keep_all(stack: Stack) -> Outcome | None:
    """Everything stays."""
    return _played(stack, {a.name: Residency(a.tokens, 0, 0) for a in stack.problem.activations})


def full_recompute(stack: Stack) -> Outcome | None:
    """Layer inputs stay, all else is recomputed: what checkpointing every block does."""
    return _played(
        stack, {a.name: _recomputed_or(stack, a, Residency(a.tokens, 0, 0)) for a in stack.problem.activations}
    )


def full_swap(stack: Stack) -> Outcome | None:
    """All goes to the host, but for the last layers, as many as fit."""
    return _best_of_last(
        stack,
        lambda last: {a.name: _offloaded_unless_last(a.tokens, stack, a.name, last) for a in stack.problem.activations},
    )


def input_swap(stack: Stack) -> Outcome | None:
    """Layer inputs go to the host, all else is recomputed: ALST's and Unsloth's way."""
    return _played(
        stack, {a.name: _recomputed_or(stack, a, Residency(0, a.tokens, 0)) for a in stack.problem.activations}
    )


def _recomputed_or(stack: Stack, a: Activation, home: Residency) -> Residency:
    """Recomputed; layers' inputs, and what cannot be recomputed, in `home`; kept where no layer holds it."""
    if stack.layer[a.name] < 0:
        return Residency(a.tokens, 0, 0)
    return home if a.name in stack.inputs or a.recompute_seconds is None else Residency(0, 0, a.tokens)


def one_alpha(stack: Stack) -> Outcome | None:
    """MEMO's way (arXiv 2407.12117, section 4.2): inputs and attention's outputs go whole, of all else a share alpha of
    the tokens, and the rest is recomputed. The last two layers stay.

    Alpha is the largest for which a layer's slices leave while the next layer runs and all fit in host memory.
    """
    alpha = largest_alpha(stack)
    if alpha is None:
        return None

    def home(a: Activation) -> Residency:
        if not 0 <= stack.layer[a.name] < stack.layers - LAST:
            return Residency(a.tokens, 0, 0)
        if a.name in stack.inputs or a.name in stack.attention or a.recompute_seconds is None:
            return Residency(0, a.tokens, 0)
        offloaded = int(alpha * a.tokens / stack.problem.slice_tokens) * stack.problem.slice_tokens
        return Residency(0, offloaded, a.tokens - offloaded)

    outcome = _played(stack, {a.name: home(a) for a in stack.problem.activations})
    return None if outcome is None else replace(outcome, share=alpha)


def largest_alpha(stack: Stack) -> float | None:
    """The paper's alpha in [0, 1]; None where not even alpha = 0 fits in host memory."""
    p = stack.problem
    middle = [a for a in p.activations if stack.layer[a.name] == stack.layers // 2]
    always = sum(a.bytes for a in middle if a.name in stack.inputs | stack.attention)
    rest = sum(a.bytes for a in middle) - always
    seconds = sum(p.seconds[a.produced] for a in middle if a.produced < p.forward_steps)
    seconds = max(seconds, _layer_seconds(stack))
    by_link = (seconds * p.d2h - always) / rest
    by_host = (p.host_budget / (stack.layers - LAST) - always) / rest
    return None if by_host < 0 else max(0.0, min(1.0, by_link, by_host))


def _layer_seconds(stack: Stack) -> float:
    """Forward seconds of a layer in the middle: from the first that it saves to the first that the next one does."""
    births: dict[int, int] = {}
    for a in stack.problem.activations:
        births[stack.layer[a.name]] = min(a.produced, births.get(stack.layer[a.name], a.produced))
    middle = stack.layers // 2
    return sum(stack.problem.seconds[births[middle - 1] : births[middle]])


def whole_tensors(stack: Stack, linear: Outcome | None) -> Outcome | None:
    """One home for each tensor, whole.

    The integer program is not solved: `linear`, memo's plan, is dealt out to whole tensors instead, as layer follows
    layer: of a tensor of which 2/5 are to be offloaded, two of five layers offload all. The integer optimum lies
    between the linear answer, which no integer plan can beat, and this: their gap bounds what a solver could gain.
    """
    best: Outcome | None = None
    spare = 0
    for _ in range(4 if linear is not None else 0):
        assert linear is not None
        budget = None if stack.problem.budget is None else stack.problem.budget - spare
        decision = decide(replace(linear.problem, budget=budget), time_limit=SOLVER_SECONDS)
        if decision is None:
            break
        residency = _dealt(linear.problem, stack, decision.residency)
        recomputed = frozenset(a.name for a in linear.problem.activations if a.recompute_seconds is not None)
        best = _faster(best, _played(stack, residency, recomputed))
        if best is not None:
            break
        spare += 2 * max(a.bytes for a in stack.problem.activations)
    for simple in (keep_all, full_recompute, full_swap, input_swap):  # whole tensors, all of them
        best = _faster(best, simple(stack))
    return best


def _dealt(problem: Problem, stack: Stack, residency: Mapping[str, Residency]) -> dict[str, Residency]:
    """Each place's shares, summed over the layers, as whole tensors; what is kept or offloaded never comes early."""
    place: dict[int, int] = {}
    owed: dict[int, list[float]] = {}
    dealt = {}
    for a in problem.activations:
        layer = stack.layer[a.name]
        position = place.setdefault(layer, 0)
        place[layer] += 1
        share, home = owed.setdefault(position, [0.0, 0.0]), residency[a.name]
        share[0] += home.kept / a.tokens
        share[1] += home.offloaded / a.tokens
        whole = a.tokens
        open_ = {0: True, 1: a.can_offload, 2: a.recompute_seconds is not None}
        chosen = next((h for h in (0, 1) if open_[h] and share[h] >= 1 - 1e-9), 2 if open_[2] else None)
        if chosen is None:
            chosen = int(share[1] > share[0])
        if chosen < 2:
            share[chosen] -= 1
        dealt[a.name] = Residency(*(whole if h == chosen else 0 for h in range(3)))
    return dealt


def planned(stack: Stack, *, close: float = 3e-4) -> Outcome | None:
    """memo's own: the linear program for each set of anchors, and the best answer as it plays.

    The search ends where an answer is within `close` of a bound on all: no first use pulled forward.
    """
    unpulled = decide(stack.problem, time_limit=SOLVER_SECONDS)
    best: Outcome | None = None
    for anchors in stack.anchors:
        recomputed = _recomputable(stack, anchors)
        decision = decide(recomputing_only(stack, recomputed), time_limit=SOLVER_SECONDS)
        if decision is not None:
            played = _played(stack, decision.residency, recomputed)
            best = _faster(best, None if played is None else replace(played, predicted=decision))
        if best is not None and unpulled is not None and best.played.seconds <= unpulled.seconds * (1 + close):
            break
    return best


STRATEGIES = ("keep all", "full recompute", "full swap", "input swap", "alpha", "whole tensors", "memo")


def alone(stack: Stack, name: str) -> tuple[Problem, Decision, bool]:
    """One of `STRATEGIES` as it plays, and whether it fits; where it does not, as it would with memory for all of it.

    Raises:
        InvalidOption: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise InvalidOption("strategy", name, f"one of {', '.join(STRATEGIES)}")
    p = stack.problem
    outcome = _by_name(stack, name)
    fits = outcome is not None
    if outcome is None:
        unlimited = replace(p, budget=None, host_budget=sum(a.bytes for a in p.activations))
        outcome = _by_name(replace(stack, problem=unlimited), name)
    assert outcome is not None, "without budgets everything fits"
    played = outcome.played
    # Without a budget nothing hurries: what such homes need is less than what was held.
    peak = played.peak if fits else max(memory_profile(outcome.problem, outcome.residency))
    stalls = sum(played.stalls.values())
    decision = Decision(
        residency=dict(outcome.residency),
        peak=peak,
        seconds=played.seconds,
        stall_seconds=stalls,
        recompute_seconds=played.recompute_seconds,
        binding=Binding.NOTHING,
        prices={},
        solver_seconds=0.0,
    )
    return replace(outcome.problem, budget=p.budget, host_budget=p.host_budget), decision, fits


def _by_name(stack: Stack, name: str) -> Outcome | None:
    rules: dict[str, Callable[[Stack], Outcome | None]] = {
        "keep all": keep_all,
        "full recompute": full_recompute,
        "full swap": full_swap,
        "input swap": input_swap,
        "alpha": one_alpha,
        "whole tensors": lambda stack: whole_tensors(stack, planned(stack)),
        "memo": planned,
    }
    return rules[name](stack)


def outcomes(stack: Stack) -> dict[str, Outcome | None]:
    """How each of `STRATEGIES` plays; None where it does not fit."""
    linear = planned(stack)
    found = (keep_all(stack), full_recompute(stack), full_swap(stack), input_swap(stack), one_alpha(stack))
    return dict(zip(STRATEGIES, (*found, whole_tensors(stack, linear), linear), strict=True))


def _recomputable(stack: Stack, anchors: Collection[str]) -> frozenset[str]:
    return frozenset(a.name for a in stack.problem.activations if a.recompute_seconds is not None) - set(anchors)


def _offloaded_unless_last(tokens: int, stack: Stack, name: str, last: int) -> Residency:
    stays = stack.layer[name] >= stack.layers - last
    return Residency(tokens, 0, 0) if stays else Residency(0, tokens, 0)


def _best_of_last(stack: Stack, residency: Callable[[int], dict[str, Residency]]) -> Outcome | None:
    """The number of last layers that stay in which the strategy is fastest."""
    best: Outcome | None = None
    for last in range(LAST + 1):
        best = _faster(best, _played(stack, residency(last)))
    return best


def _faster(a: Outcome | None, b: Outcome | None) -> Outcome | None:
    if a is None or b is None:
        return a or b
    return b if b.played.seconds < a.played.seconds else a


def _played(
    stack: Stack, residency: Mapping[str, Residency], recomputed: Collection[str] | None = None
) -> Outcome | None:
    """How these homes play; None where they exceed device or host memory."""
    recomputed = {name for name, home in residency.items() if home.recomputed} if recomputed is None else recomputed
    problem = recomputing_only(stack, recomputed)
    offloaded = sum(a.bytes * residency[a.name].offloaded / a.tokens for a in problem.activations)
    if offloaded > problem.host_budget * (1 + 1e-9):
        return None
    played = simulate(problem, residency)
    return Outcome(problem, residency, played) if played.fits else None
