"""A compilation is at one phase at a time; what Inductor calls in another order is told."""

import pytest

from memo_compile.codegen.phases import Begun, Course, ForwardEmitted, Planned


def blank(kind):
    return kind(**dict.fromkeys(kind.__dataclass_fields__))


def test_a_later_phase_does_for_an_earlier_one_and_not_the_other_way_round():
    course = Course()
    assert isinstance(course.at(Begun), Begun)
    with pytest.raises(RuntimeError, match="at Begun what is due at Planned"):
        course.at(Planned)
    course.advance(blank(Planned))
    with pytest.raises(RuntimeError, match="at Planned what is due at ForwardEmitted"):
        course.at(ForwardEmitted)
    course.advance(blank(ForwardEmitted))
    assert course.at(Planned) is course.phase
