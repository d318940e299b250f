"""The host arena: exact, leased, counted."""

import gc
import itertools

import pytest
import torch

import memo_compile
from memo_compile.errors import HostBudgetExceeded
from memo_compile.passes.transforms.slices import HOST_ALIGNMENT
from memo_compile.runtime import ops
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
