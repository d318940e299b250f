"""`place`: offsets without overlap, at the lower bound where it can be reached, with honest words about the rest."""

import os
import subprocess
import sys

import numpy as np
import pytest
from dsa import instance, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.instances import rectangles
from memo_compile.errors import FixedOffsetImpossible, InvalidBuffer, InvalidOption
from memo_compile.placement import Buffer, place, place_layers, read_csv, solve, verify
from memo_compile.placement.bounds import lower_bound, worst_moment

TWO = [Buffer("a", 8, 0, 2), Buffer("b", 8, 1, 3)]
# 7 bytes are live at most, but "b" does not fit below "held" where that is fixed.
AROUND, HELD = [Buffer("held", 2, 0, 4), Buffer("b", 5, 1, 3)], {"held": 4}


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from([1, 8, 64]))
def test_every_placement_is_valid_aligned_and_not_below_the_bound(buffers, alignment):
    answer = place(buffers, alignment=alignment, work=2_000)
    verify(buffers, answer, alignment=alignment)
    assert answer.peak >= answer.lower_bound == lower_bound(buffers, alignment)
    assert answer.proved_optimal or answer.peak > answer.lower_bound


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_same_problem_has_the_same_answer(buffers):
    assert place(buffers, work=2_000).offsets == place(list(buffers), work=2_000).offsets


@settings(max_examples=40, deadline=None)
@given(problems(most=20), st.data())
def test_fixed_offsets_aliases_and_preferences_hold_together(buffers, data):
    buffers = [
        Buffer(
            b.name,
            b.size,
            b.start,
            b.end,
            alias=data.draw(st.sampled_from([None, None, None, *(o.name for o in buffers[:i])])),
            prefer=data.draw(st.sampled_from(["any", "low", "high"])),
        )
        for i, b in enumerate(buffers)
    ]
    fixed = {buffers[0].name: 8 * data.draw(st.integers(0, 9))}
    answer = place(buffers, alignment=8, fixed=fixed, work=500)
    verify(buffers, answer, alignment=8, fixed=fixed)
    assert answer.peak >= answer.lower_bound


def test_fixed_buffers_stay_where_they_are():
    buffers = [Buffer("old", 8, 0, 10), Buffer("new", 8, 5, 6)]
    answer = place(buffers, fixed={"old": 16})
    assert answer.offsets == {"old": 16, "new": 0}
    assert (answer.peak, answer.proved_optimal) == (24, True)


def test_an_alias_lies_where_its_buffer_lies():
    buffers = [Buffer("a", 8, 0, 4), Buffer("view", 4, 2, 9, alias="a"), Buffer("b", 8, 4, 9)]
    answer = place(buffers)
    assert answer.offsets["view"] == answer.offsets["a"]
    assert answer.offsets["b"] != answer.offsets["a"]


def test_a_buffer_lies_at_the_end_that_it_prefers():
    buffers = [Buffer("a", 8, 0, 9), Buffer("x", 8, 2, 4, prefer="high"), Buffer("big", 24, 5, 9)]
    assert place(buffers).offsets["x"] == 24
    buffers[1] = Buffer("x", 8, 2, 4, prefer="low")
    assert place(buffers).offsets["x"] == 0


def test_a_capacity_below_the_bound_is_refused_with_the_moment_that_proves_it():
    answer = place(TWO, capacity=15)
    assert answer.fits is False
    assert (answer.evidence.step, answer.evidence.live, answer.evidence.buffers) == (1, 16, ("a", "b"))
    assert "at step 1 16 bytes are live, above 15: a, b" in answer.reason
    assert place(TWO, capacity=16).fits is True


def test_a_capacity_that_the_search_disproves_is_refused_without_a_moment():
    answer = place(AROUND, fixed=HELD, capacity=10)
    assert answer.fits is False
    assert answer.evidence is None
    assert "complete search" in answer.reason


def test_without_time_nothing_is_claimed():
    answer = place(AROUND, fixed=HELD, capacity=10, time_limit=0)
    assert answer.fits is None
    assert "nothing is proved" in answer.reason


def test_what_is_above_the_bound_can_be_proved_optimal():
    answer = place(AROUND, fixed=HELD)
    assert (answer.peak, answer.lower_bound, answer.proved_optimal) == (11, 7, True)


def test_the_worst_moment_is_where_most_is_live():
    assert worst_moment([Buffer("a", 4, 0, 3), Buffer("b", 2, 2, 4)]) == (2, 6)


@pytest.mark.parametrize(
    "bad",
    [
        [Buffer("a", -1, 0, 1)],
        [Buffer("a", 1, 3, 3)],
        [Buffer("a", 1, 0, 1, alias="z")],
        [Buffer("a", 1, 0, 1, alias="a")],
        [Buffer("a", 1, 0, 1, alias="b"), Buffer("b", 1, 0, 1, alias="a")],
        [Buffer("a", 1, 0, 1), Buffer("a", 1, 1, 2)],
        [Buffer("a", 1, 0, 1, prefer="remaining")],
        [Buffer("a", 1.5, 0, 1)],
        [Buffer("a", float("nan"), 0, 1)],
        [Buffer("a", 1, "0", 1)],
        [Buffer("a", 1, 0, None)],
        [Buffer("a", 2**62, 0, 1), Buffer("b", 1, 0, 1)],
        [Buffer("a", 1, 0, 2**70)],
        [("a", 1, 0, 1)],
    ],
)
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(InvalidBuffer):
        place(bad)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"z": 0}, "no such buffer"),
        ({"a": -8}, "zero or more"),
        ({"a": 4}, "multiple of 8"),
        ({"a": 0, "b": 0}, "share bytes from step 1 to 2"),
        ({"a": 8.0}, "multiple of 8"),
        ({"a": 2**70}, "multiple of 8"),
    ],
)
def test_fixed_offsets_that_cannot_hold_are_refused(fixed, message):
    with pytest.raises(FixedOffsetImpossible, match=message):
        place(TWO, alignment=8, fixed=fixed)


def test_an_alias_cannot_be_fixed_elsewhere_than_its_buffer():
    buffers = [Buffer("a", 8, 0, 4), Buffer("view", 4, 2, 9, alias="a")]
    assert place(buffers, fixed={"a": 8, "view": 8}).offsets == {"a": 8, "view": 8}
    with pytest.raises(FixedOffsetImpossible, match=r"'view'.* shares its offset with one at 8"):
        place(buffers, fixed={"a": 8, "view": 0})


@pytest.mark.parametrize(
    "bad",
    [
        {"alignment": 0},
        {"alignment": 1.5},
        {"capacity": -1},
        {"capacity": 1.5},
        {"time_limit": -1.0},
        {"time_limit": float("nan")},
        {"time_limit": "1"},
        {"work": -1},
    ],
)
def test_numbers_that_cannot_be_are_refused(bad):
    with pytest.raises(InvalidOption, match=next(iter(bad))):
        place(TWO, **bad)
    if "capacity" not in bad:
        with pytest.raises(InvalidOption, match=next(iter(bad))):
            place_layers(TWO, {"a": 0, "b": 1}, **bad)


def test_any_iterable_of_buffers_is_placed():
    assert place(b for b in TWO).offsets == place(TWO).offsets


def test_the_last_buffer_need_not_end_at_a_multiple_of_the_alignment():
    answer = place([Buffer("a", 5, 0, 1)], alignment=16, capacity=5)
    assert answer.fits
    assert (answer.peak, answer.lower_bound) == (16, 16)
    refused = place([Buffer("a", 5, 0, 1)], alignment=16, capacity=4)
    assert refused.fits is False
    assert (refused.evidence.live, refused.evidence.buffers) == (5, ("a",))
    two = place([Buffer("a", 5, 0, 1), Buffer("b", 5, 0, 1)], alignment=16, capacity=21)
    assert two.fits
    assert place([Buffer("a", 5, 0, 1), Buffer("b", 5, 0, 1)], alignment=16, capacity=16).fits is False


def test_numbers_of_numpy_do_not_overflow():
    many = [Buffer(f"b{i}", np.int32(2**30), np.int64(0), np.int64(2)) for i in range(5)]
    assert place(many, alignment=48).peak == 5 * 48 * -(-(2**30) // 48)


@pytest.mark.parametrize("limit", [1e10, float("inf")])
def test_any_number_of_seconds_is_a_limit(limit):
    assert place(rectangles(60, 0), time_limit=limit).proved_optimal


def test_the_first_call_does_not_wait_for_the_compiler_beyond_its_limit(tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 30\n")
    slow.chmod(0o755)
    code = (
        "import time; from bench.instances import rectangles; from memo_compile.placement import place\n"
        "begin = time.perf_counter(); answer = place(rectangles(120, 1), time_limit=0.5)\n"
        "assert time.perf_counter() - begin < 15\n"
        "assert 'no C++ kernel' in answer.solver\n"
    )
    environment = {**os.environ, "CXX": str(slow), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=20)


def test_nothing_to_place_takes_nothing():
    assert place([]).peak == 0
    assert place([Buffer("a", 0, 0, 1)]).offsets == {"a": 0}


def test_an_easy_problem_needs_neither_compiler_nor_highs():
    code = (
        "import sys; from memo_compile.placement import *; from memo_compile.placement import kernel;"
        "a = place([Buffer(f'b{i}', 1 + i, i, i + 3) for i in range(300)]); assert a.proved_optimal;"
        "assert 'highspy' not in sys.modules; assert kernel._loading.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_compiler_it_still_answers_and_says_so(monkeypatch):
    monkeypatch.setattr(solve.kernels, "load", lambda *_: None)
    problem = instance("minimalloc-F")
    answer = place(problem, time_limit=2)
    verify(problem, answer)
    assert "no C++ kernel" in answer.solver


@pytest.mark.parametrize("name", ["resnet50", "iopddl-G1"])
def test_a_graph_of_a_training_step_is_placed_near_the_bound(name):
    answer = place(instance(name), work=0)
    assert answer.peak <= 1.01 * answer.lower_bound


def test_a_csv_with_a_bad_row_names_the_line(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("id,lower,upper,size\na,0,2,4\nb,x,2,4\n")
    with pytest.raises(InvalidBuffer, match=":3:"):
        read_csv(file)
    file.write_text("id,lower,upper,size\na,0,2,4\n")
    assert read_csv(file) == [Buffer("a", 4, 0, 2)]


def test_what_goes_wrong_with_the_kernel_is_heard_of(monkeypatch):
    def broken():
        raise AttributeError("no such symbol")

    monkeypatch.setattr(solve.kernels, "_load", broken)
    with pytest.raises(AttributeError, match="no such symbol"):
        solve.kernels._loading.__wrapped__().result(10)
