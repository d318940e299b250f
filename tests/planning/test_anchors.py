"""Where recomputation starts from."""

from memo_compile.planning.anchors import anchor_sets, bottlenecks, first_needed

# Two layers of: residual stream x, a wide h made from it, and the next x made from both.
ORDER = ["x0", "h0", "x1", "h1", "x2"]
NEEDS = {"x0": [], "h0": ["x0"], "x1": ["x0", "h0"], "h1": ["x1"], "x2": ["x1", "h1"]}
BYTES = {"x0": 1, "h0": 4, "x1": 1, "h1": 4, "x2": 1}
FIRST = {"x0": 8, "h0": 7, "x1": 5, "h1": 3, "x2": 1}


def test_the_residual_stream_is_the_bottleneck():
    assert [set(c) for c in bottlenecks(ORDER, NEEDS, BYTES)] == [{"x0"}, {"x1"}]


def test_small_values_at_the_ends_do_not_hide_it():
    order, needs = ["mask", *ORDER], {**NEEDS, "mask": [], "x0": ["mask"]}
    found = bottlenecks(order, needs, {"mask": 0.01, **BYTES})
    assert {"x1"} in [set(c) for c in found]


def test_what_is_remade_pulls_its_sources_forward():
    needed = first_needed(ORDER, FIRST, NEEDS, set(ORDER) - {"x1"})
    assert needed == {"x0": 7, "h0": 7, "x1": 1, "h1": 1, "x2": 1}


def test_without_recomputation_nothing_moves():
    assert first_needed(ORDER, FIRST, NEEDS, ()) == FIRST


def test_the_sets_to_try_range_from_everything_to_nothing():
    sets = anchor_sets(bottlenecks(ORDER, NEEDS, BYTES), ORDER)
    assert sets[0] == frozenset(ORDER)
    assert sets[-1] == frozenset()
    assert frozenset({"x0", "x1"}) in sets
