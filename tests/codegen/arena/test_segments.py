"""Cuts leave little held in vain, and say truly what is held."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.codegen.arena import segments
from memo_compile.codegen.arena.segments import Lives, choose_cuts, held_bytes, live_bytes_of, segment_of
from memo_compile.placement import Buffer


@st.composite
def timelines(draw):
    steps = draw(st.integers(4, 30))
    border = draw(st.integers(1, steps - 1))
    buffers = []
    for i in range(draw(st.integers(1, 20))):
        start = draw(st.integers(0, steps - 1))
        buffers.append(Buffer(f"b{i}", draw(st.integers(1, 9)), start, draw(st.integers(start + 1, steps))))
    return buffers, steps, border


def held_by_hand(buffers, segment, steps):
    held = np.zeros(steps, dtype=np.int64)
    for number in set(segment):
        group = [b for b, s in zip(buffers, segment, strict=True) if s == number]
        size = max(sum(b.size for b in group if b.start <= t < b.end) for t in range(steps))
        held[min(b.start for b in group) : max(b.end for b in group)] += size
    return held


@given(timelines(), st.sets(st.integers(1, 29), max_size=4), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_what_is_held_is_the_sum_of_the_segments_lower_bounds(timeline, cuts, portion):
    buffers, steps, border = timeline
    lives = Lives.of(buffers, steps, border, portion)
    segment = segment_of(lives, tuple(cuts)).tolist()
    assert held_bytes(lives, tuple(cuts)).tolist() == held_by_hand(buffers, segment, steps).tolist()


@given(timelines())
@settings(max_examples=40, deadline=None)
def test_no_scratch_shares_a_segment_across_the_border(timeline):
    buffers, steps, border = timeline
    lives = Lives.of(buffers, steps, border, 8)
    segment = segment_of(lives, choose_cuts(lives, [0] * steps))
    for number in set(segment.tolist()):
        group = [b for b, s in zip(buffers, segment, strict=True) if s == number]
        crossing = [b.start < border < b.end for b in group]
        assert all(crossing) or not any(crossing)
        assert all(crossing) or all(b.end <= border for b in group) or all(b.start >= border for b in group)


def crowded(seed, steps=80):
    """As many buffers as steps, most of them short, and bytes beside them."""
    draw = random.Random(seed)
    border, buffers = draw.randrange(10, 30), []
    for i in range(steps):
        start, size = draw.randrange(steps - 1), draw.randrange(1, 10)
        buffers.append(Buffer(f"b{i}", size, start, min(steps, start + 1 + int(draw.expovariate(0.2)))))
    return Lives.of(buffers, steps, border, 8), [draw.randrange(15) for _ in range(steps)]


@pytest.mark.parametrize("seed", range(40, 60))
def test_where_cutting_everywhere_reaches_the_bound_so_do_the_cuts_that_are_chosen(seed):
    """Few cuts can be a dead end, from which no one or two more help."""
    lives, outside = crowded(seed)

    def worst(cuts):
        return (held_bytes(lives, cuts) + np.array(outside)).max()

    bound = (live_bytes_of(lives) + np.array(outside)).max()
    if worst(tuple(range(1, lives.steps))) == bound:
        assert worst(choose_cuts(lives, outside)) == bound


def test_gradients_find_the_room_that_dead_layers_leave():
    """Eight layers: each keeps a value and leaves a gradient outside the arena; the first to run has most scratch."""
    layers, buffers = 8, []
    steps, border = 6 * layers, 2 * layers
    outside = [0] * steps
    for i in range(layers):
        begin = border + 4 * (layers - 1 - i)
        buffers.append(Buffer(f"kept{i}", 4096, 2 * i, begin + 3))
        buffers.append(Buffer(f"scratch{i}", 32768 if i == layers - 1 else 1024, begin, begin + 2))
        buffers.append(Buffer(f"late{i}", 2048, begin + 1, begin + 4))
        for t in range(begin + 3, steps):
            outside[t] += 8192
    lives = Lives.of(buffers, steps, border, 4096)
    beside, live = np.array(outside), live_bytes_of(lives)

    def worst(cuts):
        return (held_bytes(lives, cuts) + beside).max() / (live + beside).max()

    assert worst((border,)) > 1.1
    assert worst(choose_cuts(lives, outside)) == 1.0


def test_cuts_are_looked_for_in_all_of_the_timeline():
    """A thousand moments without scratch early on do not use up the candidates that the end of the timeline needs."""
    early = [Buffer(f"early{i}", 64, 2 * i, 2 * i + 1) for i in range(1000)]
    late = [Buffer(f"late{i}", 2**20, 2000 + 7 * i, 2010 + 7 * i) for i in range(40)]
    lives = Lives.of([*early, *late], 2300, 1999, 2**20)
    candidates = segments.candidates(lives, segments.scratch_bytes(lives))
    assert len(candidates) <= segments.CANDIDATES
    assert len([t for t in candidates if t > 2000]) >= 40
