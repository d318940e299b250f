"""Is a size largest where all lengths are? Where that cannot be told, it counts as not so."""

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from memo_compile.passes.fx.growth import is_largest_at_the_end

a, b = sympy.symbols("s0 s1", integer=True, positive=True)
BOX = {a: (33, 128), b: (2, 128)}
LARGEST = {
    "a product": 4 * a * b + 3,
    "the rest after a border": a - FloorDiv(11 * a, 16),
    "rows between two borders": FloorDiv(a, 2) - FloorDiv(15 * a, 64),
    "padded to a multiple": FloorDiv(a + 63, 64) * 64,
    "padded by what is missing": a + PythonMod(-a, 16),
    "cut to a multiple": a - Mod(a, 16),
    "the smaller of two": Min(a, b),
    "a number": sympy.Integer(7),
}
ELSEWHERE = {
    "the rest after another length": a - b,
    "the same, of more": 128 * a - b,
    "a share": FloorDiv(1000, a),
    "what is missing": 200 - a,
    "what is missing, at least one": Max(1, 100 - a),
    "what is left of a multiple": Mod(a, 96),
    "what nobody knows": sympy.Function("f")(a),
    "a symbol without a range": a - sympy.Symbol("s9"),
}


@pytest.mark.parametrize("what", LARGEST)
def test_what_grows(what):
    assert is_largest_at_the_end(LARGEST[what], BOX)


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_may_be_larger_elsewhere(what):
    assert not is_largest_at_the_end(ELSEWHERE[what], BOX)


def test_single_lengths_between_are_looked_at():
    """Only at 100 it is larger than at the end."""
    peak = Max(a, 1000 * Max(0, 1 - (a - 100) ** 2))
    assert not is_largest_at_the_end(peak, BOX)
    assert is_largest_at_the_end(peak, {a: (101, 128)})


def test_combinations_within_are_looked_at():
    """Only at 50 and 60 it is larger than at the end: on no edge."""
    peak = Max(a * b, 10**6 * Max(0, 1 - (a - 50) ** 2) * Max(0, 1 - (b - 60) ** 2))
    assert not is_largest_at_the_end(peak, BOX)
    assert is_largest_at_the_end(peak, {**BOX, a: (51, 128)})


def test_too_many_lengths_are_not_looked_at():
    rest = a - FloorDiv(11 * a, 16)
    assert is_largest_at_the_end(rest, {a: (2, 2**20)})
    assert not is_largest_at_the_end(rest, {a: (2, 2**30)})
