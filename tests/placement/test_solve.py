"""`place`: offsets without overlap, at the lower bound where greedy reaches it, with honest words about the rest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.errors import InvalidBuffer, PlacementOverlap
from memo_compile.placement import Buffer, Placement, place, read_csv, verify
from memo_compile.placement.bounds import lower_bound, worst_moment

problems = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=40).map(
    lambda rows: [Buffer(f"b{i}", size, start, start + life) for i, (size, start, life) in enumerate(rows)]
)


@settings(max_examples=150, deadline=None)
@given(problems, st.sampled_from([1, 8, 64]))
def test_every_placement_is_valid_aligned_and_not_below_the_bound(buffers, alignment):
    answer = place(buffers, alignment=alignment)
    verify(buffers, answer)
    assert all(offset % alignment == 0 for offset in answer.offsets.values())
    assert answer.peak >= answer.lower_bound == lower_bound(buffers, alignment)
    assert answer.proved_optimal == (answer.peak == answer.lower_bound)


@settings(max_examples=50, deadline=None)
@given(problems)
def test_the_same_problem_has_the_same_answer(buffers):
    assert place(buffers).offsets == place(list(buffers)).offsets


def test_fixed_buffers_stay_where_they_are():
    buffers = [Buffer("old", 8, 0, 10), Buffer("new", 8, 5, 6)]
    answer = place(buffers, fixed={"old": 16})
    assert answer.offsets["old"] == 16
    assert answer.offsets["new"] == 0


def test_an_alias_lies_where_its_buffer_lies():
    buffers = [Buffer("a", 8, 0, 4), Buffer("view", 4, 2, 9, alias="a"), Buffer("b", 8, 4, 9)]
    answer = place(buffers)
    assert answer.offsets["view"] == answer.offsets["a"]
    assert answer.offsets["b"] != answer.offsets["a"]


def test_a_capacity_below_the_bound_is_refused_with_proof():
    buffers = [Buffer("a", 8, 0, 2), Buffer("b", 8, 1, 3)]
    assert place(buffers, capacity=15).fits is False
    assert place(buffers, capacity=16).fits is True


def test_the_verifier_rejects_an_overlap_and_names_both():
    buffers = [Buffer("a", 8, 0, 2), Buffer("b", 8, 1, 3)]
    with pytest.raises(PlacementOverlap, match=r"'a'.*'b'"):
        verify(buffers, Placement({"a": 0, "b": 4}, 12, 16, False, "sabotage", 0.0))


def test_the_worst_moment_is_where_most_is_live():
    assert worst_moment([Buffer("a", 4, 0, 3), Buffer("b", 2, 2, 4)]) == (2, 6)


@pytest.mark.parametrize("bad", [Buffer("a", -1, 0, 1), Buffer("a", 1, 3, 3), Buffer("a", 1, 0, 1, alias="z")])
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(InvalidBuffer):
        place([bad])


def test_a_csv_with_a_bad_row_names_the_line(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("id,lower,upper,size\na,0,2,4\nb,x,2,4\n")
    with pytest.raises(InvalidBuffer, match=":3:"):
        read_csv(file)
    file.write_text("id,lower,upper,size\na,0,2,4\n")
    assert read_csv(file) == [Buffer("a", 4, 0, 2)]
