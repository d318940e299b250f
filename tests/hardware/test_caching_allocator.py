"""What torch's CUDA allocator reserves, told from its rules; `tests/gpu/test_allocator.py` asks a device."""

import random

import pytest

from memo_compile.hardware.caching_allocator import Pools, reserved

MIB = 2**20


@pytest.mark.parametrize(
    ("nbytes", "expandable", "segment"),
    [
        (1, False, 2 * MIB),
        (MIB, False, 2 * MIB),
        (MIB + 1, False, 20 * MIB),
        (10 * MIB - 512, False, 20 * MIB),
        (10 * MIB, False, 10 * MIB),
        (11 * MIB, False, 12 * MIB),
        (1, True, 2 * MIB),
        (11 * MIB, True, 20 * MIB),
        (41 * MIB, True, 60 * MIB),
    ],
)
def test_the_first_request_takes_a_segment_of_its_class(nbytes, expandable, segment):
    assert reserved([(0, 1, nbytes)], expandable=expandable) == segment


def test_small_and_large_requests_never_share_a_segment():
    assert reserved([(0, 1, MIB), (1, 2, 2 * MIB)], expandable=False) == 22 * MIB


def test_what_was_freed_is_used_again():
    one_after_another = [(t, t + 1, 32 * MIB) for t in range(5)]
    assert reserved(one_after_another, expandable=False) == 32 * MIB
    assert reserved(one_after_another, expandable=True) == 40 * MIB


def test_the_smallest_block_that_holds_a_request_is_taken():
    """The first and the third free a block each; the fourth fits both, and leaves the larger one to the fifth."""
    lives = [(0, 2, 64 * MIB), (0, 9, 2 * MIB), (0, 2, 40 * MIB), (2, 9, 40 * MIB), (3, 9, 64 * MIB)]
    assert reserved(lives, expandable=False, rounds=1) == 20 * MIB + 104 * MIB


def test_a_large_block_is_split_unless_less_than_a_mebibyte_would_be_left():
    left = [(0, 1, 40 * MIB), (1, 2, 20 * MIB), (1, 2, 20 * MIB)]
    assert reserved(left, expandable=False, rounds=1) == 40 * MIB
    hardly = [(0, 1, 40 * MIB), (1, 2, 39 * MIB + 512), (1, 2, MIB - 512)]
    assert reserved(hardly, expandable=False, rounds=1) == 42 * MIB


def test_a_hole_that_is_too_small_stays_in_vain():
    """Two blocks go, which no neighbour joins, and what comes next is larger than either."""
    lives = [(0, 2, 40 * MIB), (0, 9, 20 * MIB), (0, 2, 40 * MIB), (0, 9, 20 * MIB), (2, 9, 60 * MIB)]
    assert reserved(lives, expandable=False, rounds=1) == 180 * MIB
    assert reserved(lives, expandable=True, rounds=1) == 180 * MIB


def test_freed_neighbours_join():
    lives = [(0, 2, 40 * MIB), (0, 2, 40 * MIB), (2, 3, 80 * MIB)]
    assert reserved(lives, expandable=True, rounds=1) == 80 * MIB
    assert reserved(lives, expandable=False, rounds=1) == 160 * MIB  # segments apart do not


def test_an_expandable_segment_grows_by_what_its_free_end_lacks():
    lives = [(0, 2, 20 * MIB), (0, 1, 40 * MIB), (1, 2, 60 * MIB)]
    assert reserved(lives, expandable=True, rounds=1) == 80 * MIB


def test_the_end_that_can_grow_is_taken_last():
    """What lives on goes into the hole that fits less well, so that the end grows on from where it is free."""
    lives = [(0, 1, 60 * MIB), (0, 9, 20 * MIB), (0, 1, 40 * MIB), (1, 9, 40 * MIB), (2, 9, 100 * MIB)]
    assert reserved(lives, expandable=True, rounds=1) == 180 * MIB


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_no_byte_is_given_twice_and_none_is_lost(seed, expandable):
    rng = random.Random(seed)
    pools, held = Pools(expandable), []
    for _ in range(300):
        if held and rng.random() < 0.5:
            pools.free(held.pop(rng.randrange(len(held))))
        else:
            held.append(pools.allocate(int(2 ** rng.uniform(8, 27))))
        assert len({id(b) for b in held}) == len(held)
        for block in held:
            assert not block.free
            assert any(b is block for b in block.segment.blocks)
        assert sum(b.size for b in held) <= pools.reserved
    peak = pools.reserved
    for block in held:
        pools.free(block)
    assert pools.reserved == peak


def test_what_has_no_bytes_or_no_life_takes_nothing():
    assert reserved([(0, 5, 0), (3, 3, 40 * MIB)], expandable=False) == 0
