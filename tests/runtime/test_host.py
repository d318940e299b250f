"""The host arena: leased, counted, used again by what fits."""

import gc
import itertools
import mmap
import random

import pytest
import torch

import memo_compile
from memo_compile.errors import HostBudgetExceeded, HostMemoryUnavailable
from memo_compile.passes.transforms.residency import HOST_ALIGNMENT
from memo_compile.runtime import blocks, host, ops
from memo_compile.runtime.host import HostPool


def test_a_lease_is_free_when_its_last_reference_is_gone():
    pool = HostPool()
    lease = pool.lease(1000)
    view = lease[10:20]
    del lease
    gc.collect()
    assert pool.leased_bytes == 1000
    del view
    gc.collect()
    assert (pool.leased_bytes, pool.held_bytes) == (0, 1000)


def test_an_idle_block_of_the_size_is_used_again():
    pool = HostPool()
    address = pool.lease(4096).data_ptr()
    assert pool.lease(4096).data_ptr() == address
    assert pool.held_bytes == 4096


def test_the_budget_counts_what_is_held_and_drops_what_is_idle():
    pool = HostPool()
    held = pool.lease(1000, budget=2000)
    pool.lease(900, budget=2000)  # idle again at once
    other = pool.lease(950, budget=2000)
    assert pool.held_bytes == 1950
    with pytest.raises(HostBudgetExceeded, match="500"):
        pool.lease(500, budget=2000)
    del held, other


def test_a_block_serves_a_smaller_request_and_the_best_fit_goes_first():
    pool = HostPool()
    blocks = {n: pool.lease(n) for n in (1000, 700, 600)}
    at = {lease.data_ptr(): n for n, lease in blocks.items()}
    del blocks
    first, second = pool.lease(550), pool.lease(550)
    assert [at[lease.data_ptr()] for lease in (first, second)] == [600, 700]
    assert first.numel() == second.numel() == 550
    assert (pool.leased_bytes, pool.held_bytes) == (1300, 2300)


def test_a_block_that_is_far_too_large_stays_for_those_that_need_it():
    """It would be missed by the next large request of the same step."""
    pool = HostPool()
    pool.lease(1000)
    small, large = pool.lease(100), pool.lease(1000)
    assert pool.held_bytes == 1100
    del small, large


def test_a_block_that_is_far_too_large_serves_where_there_is_no_room_for_another():
    pool = HostPool()
    address = pool.lease(1000).data_ptr()
    assert pool.lease(100, budget=1050).data_ptr() == address
    assert pool.held_bytes == 1000


def test_idle_blocks_that_are_too_small_make_way_for_a_larger_one():
    pool = HostPool()
    for n in range(100, 200, 10):  # lengths that grow
        pool.lease(n)
        assert pool.held_bytes == n


def test_no_more_goes_than_comes():
    """Blocks of a model's layers, of which one has grown: the others' stay."""
    pool = HostPool()
    layers = [pool.lease(100) for _ in range(8)]
    del layers
    pool.lease(110)
    assert pool.held_bytes == 7 * 100 + 110


@pytest.mark.parametrize("lengths", [(1000, 600), (1000, 100), (1000, 450, 130), (300, 1000, 600, 200, 900)])
def test_lengths_that_alternate_map_no_memory_once_all_were_seen(monkeypatch, lengths):
    made = []
    map_block = host.map_block
    monkeypatch.setattr(host, "map_block", lambda *args: made.append(args) or map_block(*args))
    pool = HostPool()
    for n in lengths * 2:
        pool.lease(n)
    seen = len(made)
    for n in lengths * 20:
        pool.lease(n)
        assert pool.held_bytes <= 4 / 3 * max(lengths)
    assert len(made) == seen


def test_lengths_at_random_hold_at_most_a_third_more_than_the_longest():
    draw, pool = random.Random(0), HostPool()
    longest = 0
    for _ in range(500):
        n = draw.randint(1, 5000)
        longest = max(longest, n)
        pool.lease(n)
        assert pool.held_bytes <= 4 / 3 * longest


def test_what_was_not_used_for_long_goes_back(monkeypatch):
    monkeypatch.setattr(host, "ROUND", 10)
    pool = HostPool()
    pool.lease(1000)
    pool.lease(100)
    for _ in range(9):
        pool.lease(1000)
    assert pool.held_bytes == 1100
    for _ in range(10):
        pool.lease(1000)
    assert pool.held_bytes == 1000


def test_a_block_that_cannot_be_made_counts_for_nothing(monkeypatch):
    pool = HostPool()

    def refuse(*args):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(host, "map_block", refuse)
        with pytest.raises(HostMemoryUnavailable):
            pool.lease(1000)
    assert pool.held_bytes == 0
    assert pool.lease(1000, budget=1000).numel() == 1000


def test_large_blocks_ask_for_huge_pages_and_none_is_a_childs(monkeypatch):
    advice = []

    class Mapping(mmap.mmap):
        def madvise(self, *args):
            advice.append((len(self), *args))
            return super().madvise(*args)

    monkeypatch.setattr(blocks.mmap, "mmap", Mapping)
    for nbytes in (4096, 4 << 20):
        blocks.map_block(nbytes, torch.device("cpu"))
    wipe = blocks._WIPE_ON_FORK
    assert advice == [(4096, wipe), (4 << 20, wipe), (4 << 20, mmap.MADV_HUGEPAGE)]


def test_the_budget_counts_what_a_block_has_and_not_what_is_asked_of_it():
    """Blocks that a call with a larger budget has left."""
    pool = HostPool()
    for left in ((1500,), (900, 800), (3000, 700)):
        held = [pool.lease(n) for n in left]
        del held
        pool.lease(800, budget=1000)
        assert pool.held_bytes <= 1000, left
        pool.drop_idle()
    pool.lease(3000)
    pool.lease(300, budget=1000)
    assert pool.held_bytes == 300


def test_what_other_calls_hold_beyond_a_budget_stops_no_call_that_takes_nothing_new():
    pool = HostPool()
    other, idle = pool.lease(5000), pool.lease(800)
    del idle
    assert pool.lease(800, budget=1000).numel() == 800
    assert pool.held_bytes == 5800
    del other


def test_reset_returns_idle_blocks_now_and_leased_ones_later():
    pool = HostPool()
    lease = pool.lease(1000)
    pool.reset()
    assert pool.held_bytes == 1000
    del lease
    assert pool.held_bytes == 0


def test_a_lease_is_plain_memory():
    lease = HostPool().lease(16)
    lease.copy_(torch.arange(16, dtype=torch.uint8))
    assert lease.tolist() == list(range(16))


def test_slices_share_no_byte_and_take_no_more_than_all_of_them():
    """Between forward and backward every slice is on the host, so that their sum is the least there can be."""
    x = torch.randn(512, 48, requires_grad=True)
    model = torch.nn.Sequential(*(layer for _ in range(4) for layer in (torch.nn.Linear(48, 48), torch.nn.Sigmoid())))
    spans = ops.recorder().trace = []
    try:
        torch.compile(model, backend="memo_eager", options={"offload": "all", "host_budget": 2**20})(x).sum().backward()
    finally:
        ops.recorder().trace = None
    (plan,) = memo_compile.plans()
    slices = sorted((s.offset, s.offset + s.nbytes) for s in spans if s.kind == "D2H")
    assert len(slices) >= 3
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(slices))
    assert sum(end - begin for begin, end in slices) <= plan.host_bytes == ops.pool().held_bytes <= 2**20
    assert plan.host_bytes == sum(-(-(end - begin) // HOST_ALIGNMENT) * HOST_ALIGNMENT for begin, end in slices)
