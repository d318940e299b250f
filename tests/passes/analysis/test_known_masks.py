"""What is said of a mask is so, and of those that models make it is said."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.analysis.known_masks import Mask, known_mask

HIDDEN = -math.inf


def added(seen):
    """To scores, where a query sees a key."""
    return torch.where(seen, 0.0, HIDDEN)


def positions(count):
    at = torch.arange(count)
    return at[:, None], at[None, :]


def as_hugging_face(count):
    """Of positions, and of segments of which there is one (transformers.masking_utils)."""
    at = (torch.arange(count) + 0)[None]
    segment = (torch.diff(at, prepend=at[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    rows, query, key = torch.zeros(1, 1, 1, 1, dtype=torch.long), at[:, None, :, None], at[:, None, None, :]
    at = at.expand(1, -1)
    seen = torch.ones((), dtype=torch.bool) & (at[rows, key] <= at[rows, query])
    seen = seen & (segment[rows, query] == segment[rows, key])
    return added(seen.expand(1, -1, count, count))


def filled(count):
    return torch.zeros(count, count).masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), HIDDEN)


def of_a_difference(count):
    query, key = positions(count)
    return added(query - key >= 0)[None, None].expand(3, 1, count, count)


def of_several(count):
    query, key = positions(count)
    return added((key <= query) & ~(query < key) & (key - query < 1))


CAUSAL = [
    as_hugging_face,
    filled,
    of_a_difference,
    of_several,
    lambda count: torch.full((count, count), HIDDEN).triu(1),
    lambda count: added(torch.ones(count, count).tril().bool()),
    lambda count: added(positions(count)[0] >= positions(count)[1]),
    lambda count: added(~(positions(count)[0] < positions(count)[1])).view(1, 1, count, count),
    lambda count: added(positions(count)[0] + 1 > positions(count)[1]),
]


def narrow(dtype, *, step=1, first=0):
    """Positions in a type that their differences do not fit."""
    return lambda count: (torch.arange(count) * step + first).to(dtype)


def differences(at):
    return lambda count: torch.zeros(count, count).masked_fill(at(count)[None] - at(count)[:, None] > 0, HIDDEN)


def later_and(condition):
    """Hides later keys where something is true, which it is not."""

    def mask(count):
        query, key = positions(count)
        return torch.zeros(count, count).masked_fill((key > query) & condition(count), HIDDEN)

    return mask


def bits(count, value, dtype, other):
    return torch.full((count, count), value, dtype=dtype).view(other)


WRAPPING = [
    differences(narrow(torch.uint8)),
    differences(narrow(torch.int8, step=6, first=-100)),
    differences(narrow(torch.int64, step=2**59, first=-(2**63))),
    lambda count: torch.zeros(count, count).masked_fill(
        -narrow(torch.int8, first=-128)(count)[None] < -narrow(torch.int8, first=-128)(count)[:, None], HIDDEN
    ),
    lambda count: torch.zeros(count, count).masked_fill(
        -narrow(torch.int64, first=-(2**63))(count)[None] < -narrow(torch.int64, first=-(2**63))(count)[:, None], HIDDEN
    ),
    lambda count: added(positions(count)[1] + 0.5 <= positions(count)[0]),
    later_and(lambda count: bits(count, 1.0, torch.float32, torch.int32) == 1),
    later_and(lambda count: bits(count, -1, torch.int8, torch.uint8) < 0),
    later_and(lambda count: torch.full((count, count), 200, dtype=torch.uint8) + torch.tensor(56) != 0),
    later_and(lambda count: torch.full((count, count), 0.0).half() + torch.tensor(1e-9) > 0),
    later_and(lambda count: torch.full((count, count), 1e-30) * torch.tensor(1e-30, dtype=torch.float64) != 0),
    lambda count: added((torch.arange(count) > 3)[None] <= (torch.arange(count) > 3)[:, None]),
    lambda count: added(torch.complex(torch.ones(count, count), torch.zeros(count, count)).real == 2),
]
OTHER = [
    lambda count: added(positions(count)[0] <= positions(count)[1]),
    lambda count: added((positions(count)[0] > positions(count)[1]) | (positions(count)[1] == 0)),
    lambda count: added((positions(count)[0] >= positions(count)[1]) & (positions(count)[0] - positions(count)[1] < 3)),
    lambda count: added(positions(count)[0] // 3 == positions(count)[1] // 3),
    lambda count: torch.full((count, count), -1e30).triu(1),
    lambda count: torch.full((count, count), HIDDEN).triu(),
    lambda count: torch.full((count, count), HIDDEN).triu(2),
    lambda count: torch.full((count, count), HIDDEN).triu(1).mT,
    lambda count: torch.full((count, count), HIDDEN).triu(1) + 1,
    lambda count: torch.empty(count, count).fill_(0.0) * torch.empty(count, count),
    lambda count: added(torch.rand(count, count) < 2),
]


def node_of(make, count):
    gm = make_fx(lambda: make(count), decomposition_table=select_decomp_table(), tracing_mode="fake")()
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0]


@pytest.mark.parametrize("count", [2, 5, 40, 300])
@pytest.mark.parametrize("make", CAUSAL)
def test_causal_masks_are_known(make, count):
    wanted = torch.full((count, count), HIDDEN).triu(1)
    assert bool((make(count) == wanted).all())
    assert known_mask(node_of(make, count)) is Mask.CAUSAL


@pytest.mark.parametrize("make", WRAPPING)
def test_numbers_that_wrap_or_are_rounded_are_no_positions(make):
    wanted = torch.full((32, 32), HIDDEN).triu(1)
    assert not torch.equal(make(32), wanted)
    assert known_mask(node_of(make, 32)) is None


@pytest.mark.parametrize("count", [5, 300])
@pytest.mark.parametrize("make", OTHER)
def test_others_are_not(make, count):
    assert known_mask(node_of(make, count)) is None


@pytest.mark.parametrize("count", [5, 300])
@pytest.mark.parametrize(
    "make",
    [
        lambda count: torch.zeros(1, 1, count, count),
        lambda count: added(torch.ones(1, count, dtype=torch.bool).expand(count, count)),
        lambda count: added(positions(count)[0] * 0 == positions(count)[1] * 0),
    ],
)
def test_a_mask_that_hides_nothing_is_known(make, count):
    assert known_mask(node_of(make, count)) is Mask.NONE


def test_a_mask_that_an_input_is_in_is_not_known():
    def padded(tokens):
        query, key = positions(40)
        return added((key <= query) & (tokens != 0))

    gm = make_fx(padded, decomposition_table=select_decomp_table(), tracing_mode="fake")(torch.ones(1, 40))
    (output,) = gm.graph.find_nodes(op="output")
    assert known_mask(output.args[0]) is None


def test_a_long_mask_is_not_computed():
    """It would have 10 to the 12 numbers."""
    assert known_mask(node_of(as_hugging_face, 2**20)) is Mask.CAUSAL


COMPARISONS = [torch.le, torch.lt, torch.ge, torch.gt, torch.eq]
JOINS = [torch.logical_and, torch.logical_or, lambda a, b: a & ~b]
SCALES, SHIFTS = st.sampled_from([1, 1, 1, 0, 2]), st.sampled_from([-128, -1, 0, 0, 1, 100])
TYPES = st.sampled_from([torch.int64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.float32, torch.bool])


@st.composite
def comparisons(draw):
    """Of positions, shifted and scaled, or of their difference with a number."""
    of_query, of_key, shift, bound = draw(SCALES), draw(SCALES), draw(SHIFTS), draw(SHIFTS)
    turned, difference, compare = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(COMPARISONS))
    dtype = draw(TYPES)
    difference &= dtype != torch.bool

    def seen(count):
        query, key = positions(count)
        left, right = (query * of_query + shift).to(dtype), (key * of_key).to(dtype)
        left, right = (right, left) if turned else (left, right)
        return compare(left - right, bound) if difference else compare(left, right)

    return seen


@st.composite
def masks(draw):
    """Of some comparisons."""
    parts = draw(st.lists(comparisons(), min_size=1, max_size=3))
    joins = [draw(st.sampled_from(JOINS)) for _ in parts[1:]]

    def mask(count):
        seen = parts[0](count)
        for join, part in zip(joins, parts[1:], strict=True):
            seen = join(seen, part(count))
        return added(seen)

    return mask


@settings(max_examples=150, deadline=None)
@given(make=masks(), count=st.sampled_from([2, 17, 40]))
def test_what_is_said_of_a_mask_is_so(make, count):
    mask = make(count).expand(count, count)
    later = {Mask.CAUSAL: HIDDEN, Mask.NONE: 0.0}.get(known_mask(node_of(make, count)))
    assert later is None or bool((mask == torch.where(torch.ones_like(mask).tril().bool(), 0.0, later)).all())
