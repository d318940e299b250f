"""The verifier: every way in which a placement can be wrong is named."""

import pytest
from dsa import problems
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.errors import PlacementOverlap
from memo_compile.placement import Buffer, Placement, verify

TWO = [Buffer("a", 8, 0, 2), Buffer("b", 8, 1, 3)]


@pytest.mark.parametrize(
    ("buffers", "offsets", "message"),
    [
        (TWO, {"a": 0, "b": 4}, r"'a' at 0 and 'b' at 4 share bytes from step 1 to 2"),
        (TWO, {"a": 8, "b": 8}, "share bytes"),
        (TWO, {"a": 0}, "'b' has no offset"),
        (TWO, {"a": -8, "b": 0}, "'a' has no offset, or a negative one"),
        ([Buffer("a", 8, 0, 9), Buffer("v", 4, 3, 5, alias="a")], {"a": 0, "v": 4}, "'v' at 4 does not share"),
        (
            [Buffer("a", 8, 0, 9), Buffer("v", 16, 3, 5, alias="a"), Buffer("b", 4, 4, 6)],
            {"a": 0, "v": 0, "b": 12},
            "'v'",
        ),
    ],
)
def test_what_is_wrong_is_named(buffers, offsets, message):
    with pytest.raises(PlacementOverlap, match=message):
        verify(buffers, offsets)


def test_a_peak_below_a_buffer_an_unaligned_offset_and_a_moved_fixed_buffer_are_named():
    offsets = {"a": 0, "b": 8}
    verify(TWO, offsets, alignment=8, fixed={"b": 8})
    with pytest.raises(PlacementOverlap, match="above 12"):
        verify(TWO, Placement(offsets, 12, 16, False, "sabotage", 0.0))
    with pytest.raises(PlacementOverlap, match="multiple of 16"):
        verify(TWO, offsets, alignment=16)
    with pytest.raises(PlacementOverlap, match="stay at 16"):
        verify(TWO, offsets, fixed={"b": 16})


@settings(max_examples=50, deadline=None)
@given(problems(most=12, steps=8, size=6), st.data())
def test_it_agrees_with_looking_at_every_pair(buffers, data):
    offsets = {b.name: data.draw(st.integers(0, 30)) for b in buffers}
    overlap = any(
        a.start < b.end and b.start < a.end
        and max(offsets[a.name], offsets[b.name]) < min(offsets[a.name] + a.size, offsets[b.name] + b.size)
        for i, a in enumerate(buffers)
        for b in buffers[:i]
    )  # fmt: skip
    if overlap:
        with pytest.raises(PlacementOverlap):
            verify(buffers, offsets)
    else:
        verify(buffers, offsets)


def test_what_shares_a_storage_holds_it_between_its_lives():
    shared = [Buffer("a", 4, 0, 1), Buffer("b", 4, 2, 3, alias="a"), Buffer("c", 4, 1, 2)]
    verify(shared, {"a": 0, "b": 0, "c": 4})
    with pytest.raises(PlacementOverlap, match="share bytes"):
        verify(shared, {"a": 0, "b": 0, "c": 0})


def test_a_name_given_twice_is_rejected():
    with pytest.raises(PlacementOverlap, match="given twice"):
        verify([Buffer("a", 4, 0, 1), Buffer("a", 4, 0, 1)], {"a": 0})
