"""The simulator plays plans without the linear program, and the two agree."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench import zoo
from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning import decide as planning
from memo_compile.planning.fit_budget import fit_budget
from memo_compile.planning.residency import Activation, Problem
from memo_compile.planning.rounding import decide, evaluate
from memo_compile.planning.simulate import simulate
from memo_compile.trace.offline import trace
from memo_compile.trace.setting import limits_for

MIB = 2**20
KEPT, AWAY, AGAIN = Residency(64, 0, 0), Residency(0, 64, 0), Residency(0, 0, 64)


def stack(sizes, *, step=1e-3, recompute=5e-4, budget=None, rate=1e12, host=1 << 40, base=0):
    """One activation a layer; the backward reads them the other way round."""
    n = len(sizes)
    activations = tuple(
        Activation(f"a{i}", size, 64, i, i, 2 * n - 1 - i, 2 * n - 1 - i, recompute) for i, size in enumerate(sizes)
    )
    return Problem((step,) * (2 * n), (base,) * (2 * n), n, activations, budget, host, rate, rate)


def residency(problem, home):
    return {a.name: home for a in problem.activations}


def test_keeping_all_takes_the_steps_own_time_and_all_the_memory():
    problem = stack([MIB] * 4, base=MIB)
    s = simulate(problem, residency(problem, KEPT))
    assert s.seconds == pytest.approx(8e-3)
    assert s.peak == 5 * MIB
    assert s.offloaded_bytes == 0


def test_recomputing_all_adds_the_recomputation_and_holds_one():
    problem = stack([MIB] * 4)
    s = simulate(problem, residency(problem, AGAIN))
    assert s.seconds == pytest.approx(8e-3 + 4 * 5e-4)
    assert s.peak == MIB


def test_a_slow_link_makes_the_forward_wait_for_room_and_the_backward_for_prefetches():
    """1 MiB takes 2 steps to copy. Room for 2 MiB: each forward step from the third on waits one step more."""
    problem = stack([MIB] * 4, budget=2 * MIB, rate=MIB / 2e-3)
    s = simulate(problem, residency(problem, AWAY))
    assert s.fits
    assert s.stalls["room"] > 0
    assert s.stalls["prefetch"] > 0
    # The last slice leaves 4 copies after the first could, and comes back before 4 more are through.
    assert s.seconds >= 1e-3 + 4 * 2e-3 + 3 * 2e-3
    assert s.seconds == pytest.approx(8e-3 + sum(s.stalls.values()))


def test_a_fast_link_hides_behind_the_steps():
    problem = stack([MIB] * 8, budget=3 * MIB, rate=MIB / 0.5e-3)
    plan = {**residency(problem, AWAY), "a7": KEPT}
    s = simulate(problem, plan)
    assert s.seconds == pytest.approx(16e-3)
    assert s.overlap == pytest.approx(1.0)


def test_a_step_that_cannot_fit_is_told():
    problem = stack([MIB] * 3, budget=2 * MIB, base=2 * MIB)
    assert not simulate(problem, residency(problem, AWAY)).fits


def test_the_trace_has_three_streams_and_no_stream_does_two_things_at_once():
    problem = stack([MIB] * 5, budget=3 * MIB, rate=MIB / 1e-3)
    trace = json.loads(simulate(problem, residency(problem, AWAY)).to_trace())["traceEvents"]
    spans = [e for e in trace if e["ph"] == "X"]
    for stream in (0, 1, 2):
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == stream)
        assert own
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in itertools.pairwise(own))
    moved = {tid: sum(e["args"]["bytes"] for e in spans if e["tid"] == tid) for tid in (1, 2)}
    assert moved[1] == moved[2] == 5 * MIB


def test_a_slice_comes_back_after_it_has_left():
    problem = stack([MIB] * 3, budget=2 * MIB, rate=MIB / 4e-3)
    events = simulate(problem, residency(problem, AWAY)).events
    for name in ("a0", "a1", "a2"):
        left = max(e.end for e in events if e.stream == "d2h" and e.name == name)
        began = min(e.start for e in events if e.stream == "h2d" and e.name == name)
        assert began >= left - 1e-12


@st.composite
def problems(draw, most=7):
    """Layers of one or two activations, of which some live on for a layer, or are needed early to recompute others."""
    n = draw(st.integers(2, most))
    seconds = draw(st.lists(st.sampled_from([1e-4, 1e-3, 4e-3]), min_size=2 * n, max_size=2 * n))
    base = draw(st.lists(st.integers(0, 4), min_size=2 * n, max_size=2 * n))
    activations = []
    for i in range(n):
        for j in range(draw(st.integers(1, 2))):
            last = 2 * n - 1 - i
            activations.append(
                Activation(
                    f"a{i}_{j}",
                    MIB * draw(st.integers(1, 64)) // 4,
                    64,
                    i,
                    min(n - 1, i + draw(st.integers(0, 2))),
                    draw(st.integers(max(n, last - 1), last)),
                    last,
                    draw(st.sampled_from([None, 5e-4, 3e-3])),
                    draw(st.booleans()),
                )
            )
    total = sum(a.bytes for a in activations)
    budget = int(total * draw(st.floats(0.3, 1.1)))
    host = int(total * draw(st.sampled_from([0.2, 2.0])))
    rates = (draw(st.sampled_from([3e8, 3e9, 1e11])) for _ in range(2))
    return Problem(tuple(seconds), tuple(b * MIB for b in base), n, tuple(activations), budget, host, *rates)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_the_program_predicts_what_the_simulator_plays(problem):
    decision = decide(problem)
    assume(decision is not None)
    played = simulate(problem, decision.residency)
    assert played.fits
    assert decision.seconds == pytest.approx(played.seconds, rel=0.01)
    assert decision.peak == pytest.approx(played.peak, rel=0.01, abs=64)
    assert played.offloaded_bytes <= problem.host_budget + 1


@pytest.mark.parametrize("rate", [3e8, 1e9, 4e9])
def test_the_program_knows_that_nothing_comes_back_before_it_has_left(rate):
    """All that leaves last is needed first: the backward begins with a wait for both copies, one after the other."""
    problem = stack([MIB] * 6, rate=rate)
    away = residency(problem, AWAY)
    assert evaluate(problem, away).seconds == pytest.approx(simulate(problem, away).seconds, rel=0.03)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(most=3))
def test_no_residency_in_quarters_plays_faster(problem):
    """Brute force, with the simulator as the judge: every mix of quarters of every activation."""
    few = replace(problem, activations=problem.activations[:4])
    mixes = [(k, o, 4 - k - o) for k in range(5) for o in range(5 - k)]
    options = [
        [
            Residency(16 * k, 16 * o, 16 * r)
            for k, o, r in mixes
            if (a.can_offload or not o) and (a.recompute_seconds or not r)
        ]
        for a in few.activations
    ]
    assume(0 < len(list(itertools.product(*options))) <= 4000)
    fastest = float("inf")
    for mix in itertools.product(*options):
        plan = {a.name: home for a, home in zip(few.activations, mix, strict=True)}
        if sum(a.bytes * plan[a.name].offloaded // 64 for a in few.activations) <= few.host_budget:
            played = simulate(few, plan)
            fastest = min(fastest, played.seconds if played.fits else float("inf"))
    decision = decide(few)
    if fastest < float("inf"):
        assert decision is not None
        # What rounding may cost: one slice of each activation, moved or recomputed.
        slices = sum(
            a.bytes / 64 * (1 / few.d2h + 1 / few.h2d) + (a.recompute_seconds or 0) / 64 for a in few.activations
        )
        assert simulate(few, decision.residency).seconds <= fastest * 1.001 + slices


@pytest.mark.parametrize("hardware", ["a800", "h200"])
@pytest.mark.parametrize("target", [zoo.llama, zoo.gpt_dropout, zoo.hf_gpt2, zoo.hf_llama])
def test_the_program_predicts_what_the_simulator_plays_for_real_models(target, hardware):
    model, args, kwargs, _ = target()
    p, setting = trace(model, args, kwargs, {"memory_budget": 0.65, "hardware": hardware})
    limits = limits_for(setting, p.unplanned_peak)
    make = partial(planning.decide, p, name="zoo", backend="memo")
    decided = fit_budget(p, limits, make, lambda d: (d.plan.predicted_peak, None)).decided
    where = {name: Residency(h.kept, h.offloaded, h.recomputed) for name, h in decided.residency.items()}
    assert any(r.offloaded or r.recomputed for r in where.values())
    predicted, played = evaluate(decided.problem, where), simulate(decided.problem, where)
    assert predicted.seconds == pytest.approx(played.seconds, rel=0.03)
    assert predicted.peak == pytest.approx(played.peak, rel=0.01)
