"""Segments are joined where less is reserved for it, and nothing that was promised changes."""

import random

import pytest

from memo_compile.codegen.arena.joining import Beside, join
from memo_compile.hardware.caching_allocator import reserved
from memo_compile.placement import Buffer
from memo_compile.placement.bounds import live_bytes

MIB = 2**20
BORDER, STEPS = 30, 60


def life(group):
    start, end = min(b.start for b in group), max(b.end for b in group)
    return start, end, max(live_bytes([(b.start, b.end, b.size) for b in group], STEPS))


def drawn(seed):
    """Scratch of each graph, kept activations that go in turn, and gradients beside them."""
    rng = random.Random(seed)
    groups = []
    for i in range(24):
        begin = rng.randrange(0, STEPS - 2)
        end = min(begin + rng.randrange(1, 8), BORDER if begin < BORDER else STEPS)
        groups.append([Buffer(f"scratch{i}", rng.randrange(1, 200) * MIB, begin, end)])
    groups += [[Buffer(f"kept{i}", rng.randrange(1, 200) * MIB, 4 * i, STEPS - 4 * i)] for i in range(6)]
    lives = [(BORDER + 5 * i, STEPS, rng.randrange(1, 60) * MIB) for i in range(6)]
    return groups, Beside(live_bytes(lives, STEPS), lives, BORDER, frozenset({"scratch3"}))


def held(groups, beside):
    segments = live_bytes([life(g) for g in groups], STEPS)
    return [s + o for s, o in zip(segments, beside.outside, strict=True)]


def taken(groups, beside, expandable):
    return reserved([*map(life, groups), *beside.lives], expandable=expandable, rounds=2)


def test_less_is_reserved_and_less_often():
    for expandable in (False, True):
        cases = [drawn(seed) for seed in range(8)]
        before = [(taken(g, b, expandable), len(g)) for g, b in cases]
        joined = [join(g, b, expandable=expandable) for g, b in cases]
        after = [(taken(g, b, expandable), len(g)) for g, (_, b) in zip(joined, cases, strict=True)]
        assert all(now <= then for (now, _), (then, _) in zip(after, before, strict=True))
        assert sum(now for now, _ in after) < 0.97 * sum(then for then, _ in before)
        assert sum(n for _, n in after) < 0.7 * sum(n for _, n in before)


@pytest.mark.parametrize("seed", range(8))
def test_the_peak_stays_and_what_is_held_between_the_graphs(seed):
    groups, beside = drawn(seed)
    joined = join(groups, beside, expandable=True)
    assert max(held(joined, beside)) <= max(held(groups, beside))

    def between(groups):
        return sum(size for start, end, size in map(life, groups) if start < BORDER < end)

    assert between(joined) <= between(groups)


@pytest.mark.parametrize("seed", range(8))
def test_every_buffer_keeps_its_side(seed):
    """A segment that the forward takes holds nothing of the backward's; what is to lie alone does."""
    groups, beside = drawn(seed)
    joined = join(groups, beside, expandable=False)
    assert sorted(b.name for g in joined for b in g) == sorted(b.name for g in groups for b in g)
    assert all(len({b.start < BORDER for b in g}) == 1 for g in joined)
    assert [b.name for g in joined for b in g if any(b.name == "scratch3" for b in g)] == ["scratch3"]


def test_sizes_count_as_they_are_aligned():
    """Ten are held at most; what is joined holds three beside seven, or four."""
    groups = [[Buffer("a", 3 * MIB, 0, 2)], [Buffer("b", 3 * MIB, 3, 5)]]
    beside = Beside([0, 0, 7 * MIB, 0, 0, 0, 10 * MIB, *[0] * (STEPS - 7)], [], BORDER)
    assert len(join(groups, beside, expandable=False)) == 1
    assert len(join(groups, beside, expandable=False, alignment=4 * MIB)) == 2


def test_scratch_joins_what_is_kept_only_where_it_is_held_no_longer_for_it():
    """Between the graphs others hold memory, too, and are told that what is kept is all there is."""
    room = Beside([200 * MIB, *[0] * (STEPS - 1)], [], BORDER)
    kept = [Buffer("kept", 40 * MIB, 5, 50)]
    assert len(join([kept, [Buffer("beside", 30 * MIB, 6, 10)]], room, expandable=False)) == 2
    assert len(join([kept, [Buffer("before", 30 * MIB, 2, 5)]], room, expandable=False)) == 1
