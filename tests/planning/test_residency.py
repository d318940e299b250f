"""The linear program: budgets kept, cheapest homes chosen."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.errors import SolverOutOfTime
from memo_compile.planning.residency import Activation, Problem, memory_profile
from memo_compile.planning.rounding import decide, least, slightly_more, smallest_peak

MIB = 2**20


def layered(n=4, *, size=MIB, tokens=64, recompute=1e-3, seconds=1e-3, budget=None, rate=1e12, host=1 << 40):
    """`n` activations of one size: a forward of n steps, and a backward that reads them the other way round."""
    activations = tuple(
        Activation(
            name=f"a{i}",
            bytes=size,
            tokens=tokens,
            produced=i,
            last_forward=i,
            first_backward=2 * n - 1 - i,
            last_backward=2 * n - 1 - i,
            recompute_seconds=recompute,
        )
        for i in range(n)
    )
    return Problem((seconds,) * (2 * n), (0,) * (2 * n), n, activations, budget, host, rate, rate)


def test_with_room_everything_stays():
    decision = decide(layered())
    assert all(r.kept == 64 for r in decision.residency.values())


def test_a_fast_link_offloads_and_a_slow_one_recomputes():
    fast = decide(layered(budget=2 * MIB))
    slow = decide(layered(budget=2 * MIB, rate=1e6))
    assert sum(r.offloaded for r in fast.residency.values()) > 0
    assert fast.recompute_seconds == 0
    assert sum(r.recomputed for r in slow.residency.values()) > 0
    assert sum(r.offloaded for r in slow.residency.values()) == 0


def test_what_must_not_run_twice_is_not_recomputed():
    problem = layered(budget=2 * MIB, rate=1e6)
    problem = replace(problem, activations=tuple(replace(a, recompute_seconds=None) for a in problem.activations))
    assert all(r.recomputed == 0 for r in decide(problem).residency.values())


def test_the_host_budget_holds():
    decision = decide(layered(8, budget=3 * MIB, host=MIB))
    offloaded = sum(r.offloaded * MIB // 64 for r in decision.residency.values())
    assert offloaded <= MIB
    assert sum(r.recomputed for r in decision.residency.values()) > 0


def test_what_cannot_be_sliced_has_one_home():
    problem = layered(budget=int(2.5 * MIB), tokens=1)
    for r in decide(problem).residency.values():
        assert sorted((r.kept, r.offloaded, r.recomputed)) == [0, 0, 1]


def test_there_is_no_plan_below_the_least():
    problem = layered(budget=MIB)
    smallest = least(problem)
    assert decide(replace(problem, budget=smallest.peak + 8192)) is not None
    assert decide(replace(problem, budget=int(0.9 * smallest.peak))) is None


def test_the_same_problem_gives_the_same_plan():
    problem = layered(6, budget=3 * MIB, rate=2e9)
    assert decide(problem).residency == decide(problem).residency


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 7),
    st.lists(st.integers(1, 64), min_size=7, max_size=7),
    st.floats(0.3, 1.2),
    st.sampled_from([1e8, 1e9, 1e11]),
)
def test_rows_sum_to_all_and_the_budget_is_kept(n, sizes, share, rate):
    problem = layered(n, rate=rate)
    activations = tuple(replace(a, bytes=64 * 1024 * s) for a, s in zip(problem.activations, sizes, strict=False))
    problem = replace(problem, activations=activations)
    whole = sum(a.bytes for a in activations)
    decision = decide(replace(problem, budget=max(int(share * whole), max(a.bytes for a in activations))))
    if decision is None:
        return
    for a in activations:
        r = decision.residency[a.name]
        assert r.kept + r.offloaded + r.recomputed == a.tokens
        assert min(r.kept, r.offloaded, r.recomputed) >= 0
    assert max(memory_profile(problem, decision.residency)) <= max(share * whole, max(a.bytes for a in activations)) + 1


@pytest.mark.parametrize("tokens", [1, 64])
def test_running_out_of_time_is_not_the_same_as_having_no_plan(tokens):
    problem = layered(40, tokens=tokens, budget=9 * MIB, rate=1e9)
    with pytest.raises(SolverOutOfTime, match=r"solver_time_limit = 1e-06"):
        decide(problem, time_limit=1e-6)
    assert decide(problem) is not None
    assert decide(replace(problem, budget=MIB // 2)) is None


def test_the_smallest_peak_is_told_without_deciding():
    problem = layered(6, rate=1e9)
    assert smallest_peak(problem) <= least(problem).peak <= slightly_more(smallest_peak(problem)) + 1


def test_whole_tensors_have_prices_too():
    """Those of slices: one more tensor kept in each of twenty layers is as good as a twentieth of each."""
    problem = layered(20, tokens=1, budget=6 * MIB, rate=1e6)
    decision = decide(problem)
    assert decision.binding == "device memory"
    saved = decision.seconds - decide(replace(problem, budget=10 * MIB)).seconds
    assert saved / (4 / 1024) == pytest.approx(decision.prices["device memory"], rel=0.1)


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_smaller_budget_is_never_faster(tokens):
    seconds = [decide(layered(6, tokens=tokens, budget=int(b * MIB), rate=1e9)).seconds for b in (6, 5, 4, 3, 2)]
    assert seconds == sorted(seconds)


def seconds_at(problem, **changes):
    return decide(replace(problem, slice_tokens=1, **changes)).seconds


def fine(problem):
    """Slices so thin that rounding hides no price."""
    return replace(problem, activations=tuple(replace(a, tokens=1 << 20) for a in problem.activations))


def test_the_price_of_device_memory_is_what_more_of_it_saves():
    problem = fine(layered(8, budget=int(3.3 * MIB), rate=1e8))
    decision = decide(problem)
    assert decision.binding == "device memory"
    saved = seconds_at(problem) - seconds_at(problem, budget=problem.budget + 8192)
    assert saved / 8192 * 2**30 == pytest.approx(decision.prices["device memory"], rel=0.05)


def test_the_price_of_host_memory_is_what_more_of_it_saves():
    problem = fine(layered(8, budget=2 * MIB, host=2 * MIB + 5000, rate=1e11))
    decision = decide(problem)
    saved = seconds_at(problem) - seconds_at(problem, host_budget=problem.host_budget + 8192)
    assert decision.prices["host memory"] > 0
    assert saved / 8192 * 2**30 == pytest.approx(decision.prices["host memory"], rel=0.05)


def test_the_prices_of_the_rates_are_what_faster_links_save():
    problem = fine(layered(8, budget=2 * MIB, rate=6e8))
    problem = replace(problem, activations=tuple(replace(a, recompute_seconds=None) for a in problem.activations))
    decision = decide(problem)
    for field, name in (("d2h", "offload rate"), ("h2d", "prefetch rate")):
        saved = seconds_at(problem) - seconds_at(problem, **{field: getattr(problem, field) + 1e6})
        assert decision.prices[name] > 0
        assert saved * 1e3 == pytest.approx(decision.prices[name], rel=0.05)


def test_with_room_nothing_binds():
    decision = decide(layered())
    assert decision.binding == "nothing"
    assert set(decision.prices.values()) == {0.0}


def test_of_equally_fast_plans_the_one_that_moves_fewer_bytes_is_taken():
    """One MiB must go; the two differ in size and nothing else, and both copies would hide."""
    problem = layered(4, budget=3 * MIB, rate=1e12, recompute=None)
    decision = decide(problem)
    moved = sum(r.offloaded for r in decision.residency.values()) * MIB // 64
    assert moved <= MIB + 4 * MIB // 64


def test_copies_overlap_with_what_still_reads_the_value():
    """The second step reads the first's value for long enough to copy it: the third finds it gone, without a stall."""
    n = 3
    activations = (Activation("long", MIB, 64, 0, 1, 5, 5, None), Activation("next", MIB, 64, 2, 2, 3, 3, None))
    problem = Problem(
        (1e-3, 10e-3, 1e-3, 1e-3, 10e-3, 1e-3), (0,) * 6, n, activations, MIB + 4096, 1 << 40, MIB / 5e-3, MIB / 5e-3
    )
    decision = decide(problem)
    assert decision.residency["long"].offloaded == 64
    assert decision.stall_seconds == pytest.approx(0.0, abs=1e-9)
