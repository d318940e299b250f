"""The custom ops, as torch checks them."""

import torch

from memo_compile.runtime.ops import pool, register, transfer_stats

register()
ops = torch.ops.memo


def test_opcheck():
    lease = ops.host_lease(256, -1)
    src, dst = torch.randn(8, 4), torch.empty(8, 4)
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.host_lease.default, (256, -1), test_utils=kinds)
    torch.library.opcheck(ops.offload.default, (src, lease, 0), test_utils=kinds)
    for _ in range(2):  # each check runs the op, and a wait belongs to one copy
        ops.offload(src, lease, 0)
    ops.offload_wait(src, lease, 0)
    torch.library.opcheck(ops.prefetch_.default, (dst, lease, 0), test_utils=kinds)
    ops.prefetch_(dst, lease, 0)
    ops.wait_(dst, lease, 0)
    assert torch.equal(src, dst)


def test_ops_move_what_they_say():
    before = transfer_stats()
    lease = ops.host_lease(64, -1)
    src, dst = torch.arange(16.0), torch.zeros(16)
    ops.offload(src, lease, 0)
    ops.offload_wait(src, lease, 0)
    ops.prefetch_(dst, lease, 0)
    ops.wait_(dst, lease, 0)
    after = transfer_stats()
    assert torch.equal(src, dst)
    assert after.bytes_out - before.bytes_out == after.bytes_in - before.bytes_in == 64


def test_a_lease_lies_outside_torchs_allocator():
    import memo_compile

    held = []
    peak = memo_compile.measure_peak(lambda: held.append(ops.host_lease(1 << 20, -1)))
    assert peak < 1 << 16
    assert pool().leased_bytes >= 1 << 20
