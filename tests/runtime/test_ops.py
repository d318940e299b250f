"""The custom ops, as torch checks them: schemas that say what they mutate, fakes that agree with what runs."""

import ctypes

import pytest
import torch
from runtime.simulated import Cuda

from memo_compile.runtime import ops as runtime
from memo_compile.runtime.cross_call import CrossCallPrefetch
from memo_compile.runtime.ops import engine, pool, register, transfer_stats
from memo_compile.runtime.streams import StreamEngine

register()
CPU = torch.device("cpu")
ops = torch.ops.memo
# No autograd formula, no dynamic shapes: the ops stand in graphs of fixed sizes, out of which autograd was traced.
CHECKS = ("test_schema", "test_faketensor")


@pytest.fixture(autouse=True)
def _nothing_pending():
    yield
    engine(torch.device("cpu")).drain()


def lease_with(src):
    lease = ops.host_lease(256, -1, CPU)
    ops.offload(src, lease, 0)
    ops.offload_wait(src, lease, 0)
    return lease


def test_opcheck_host_lease():
    torch.library.opcheck(ops.host_lease.default, (256, -1, CPU), test_utils=CHECKS)


def test_opcheck_offload():
    torch.library.opcheck(ops.offload.default, (torch.randn(8, 4), ops.host_lease(256, -1, CPU), 0), test_utils=CHECKS)


def test_opcheck_prefetch():
    lease = lease_with(torch.randn(8, 4))
    torch.library.opcheck(ops.prefetch_.default, (torch.empty(8, 4), lease, 0), test_utils=CHECKS)


def test_opcheck_keep():
    torch.library.opcheck(ops.keep.default, (torch.randn(8, 4)[2:],), test_utils=CHECKS)


def attention_inputs():
    """Queries, keys, values, the output's gradient, output, row sums."""
    q, k, v, g, out = (torch.randn(1, 4, 16, 8) for _ in range(5))
    return q, k, v, g, out, torch.randn(1, 4, 16)


def test_opcheck_attention_onto():
    q, k, v, _, _, sums = attention_inputs()
    torch.library.opcheck(ops.attention_onto.default, (q, sums, k, v, 0.0, True, 2), test_utils=CHECKS)


def test_opcheck_attention_backward_onto():
    args = (*attention_inputs(), 0.0, True, 2)
    torch.library.opcheck(ops.attention_backward_onto.default, args, test_utils=CHECKS)


def test_what_stands_in_emitted_code_writes_the_same():
    q, k, v, g, out, sums = attention_inputs()
    here = [t.clone() for t in (q, k, v)]
    expected = ops.attention_backward_onto(q, k, v, g, out, sums, 0.0, True, 2)
    token = ops.attention_backward_onto_(here, *here, g, out, sums, 0.0, True, 2)
    assert token.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(here, expected, strict=True))
    q, k, v, _, _, sums = attention_inputs()
    here = [q.clone(), sums.clone()]
    expected = ops.attention_onto(q, sums, k, v, 0.0, True, 2)
    ops.attention_onto_(here, *here, k, v, 0.0, True, 2)
    assert all(torch.equal(a, b) for a, b in zip(here, expected, strict=True))


def test_what_is_kept_lies_alone():
    whole = torch.randn(2, 8, 4)
    kept = ops.keep(whole[:, 6:])
    assert torch.equal(kept, whole[:, 6:])
    assert kept.untyped_storage().nbytes() == 2 * 2 * 4 * 4


def test_opcheck_prefetch_buffer():
    lease = ops.host_lease(256, -1, CPU)
    args = (lease, 0, 64, torch.device("cpu"))
    torch.library.opcheck(ops.prefetch_buffer.default, args, test_utils=("test_faketensor",))


@pytest.mark.parametrize("name", ["offload_wait", "wait_"])
def test_opcheck_waits(name, monkeypatch):
    """A wait belongs to one copy on one address, and opcheck clones its arguments: here every wait finds its copy."""
    mover = engine(torch.device("cpu"))
    start = mover.offload if name == "offload_wait" else mover.prefetch
    finish = "offload_wait" if name == "offload_wait" else "prefetch_wait"
    original = getattr(mover, finish)

    def with_its_copy(tensor, lease, offset):
        start(tensor, lease, offset)
        original(tensor, lease, offset)

    monkeypatch.setattr(mover, finish, with_its_copy)
    tensor = torch.randn(8, 4)
    lease = lease_with(tensor)
    op = getattr(ops, name).default
    torch.library.opcheck(op, (tensor, lease, 0), test_utils=("test_faketensor",))
    assert [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments] == (
        [False, True, False] if name == "offload_wait" else [True, False, False]
    )


def test_opcheck_matmuls():
    a, b, bias = torch.randn(8, 3), torch.randn(3, 4), torch.randn(4)
    torch.library.opcheck(ops.mm_into_.default, (torch.empty(8, 4), a, b), test_utils=CHECKS)
    torch.library.opcheck(ops.addmm_into_.default, (torch.empty(8, 4), bias, a, b), test_utils=CHECKS)


def test_matmuls_are_written_to_rows_of_a_larger_value():
    a, b, bias = torch.randn(8, 3), torch.randn(3, 4), torch.randn(4)
    whole = torch.zeros(12, 4)
    ops.mm_into_(whole[:8], a, b)
    assert torch.equal(whole[:8], a @ b)
    ops.addmm_into_(whole[4:], bias, a, b)
    assert torch.equal(whole[4:], torch.addmm(bias, a, b))


def test_ops_move_what_they_say():
    before = transfer_stats()
    src, dst = torch.arange(16.0), torch.zeros(16)
    lease = lease_with(src)
    ops.prefetch_(dst, lease, 0)
    ops.wait_(dst, lease, 0)
    after = transfer_stats()
    assert torch.equal(src, dst)
    assert after.bytes_out - before.bytes_out == after.bytes_in - before.bytes_in == 64


def test_a_lease_lies_outside_torchs_allocator():
    import memo_compile

    held = []

    def lease():
        held.append(ops.host_lease(1 << 20, -1, CPU))
        torch.empty(1 << 12, dtype=torch.uint8)

    assert memo_compile.measure_peak(lease) == 1 << 12
    assert pool().leased_bytes >= 1 << 20


@pytest.mark.parametrize("second", ["same", "other"])
def test_a_block_that_another_device_had_is_not_written_before_it_has_been_read(second, monkeypatch):
    """On streams: the host goes on, and gives the block back, while the first device's copies are still to come."""
    slow, fast = Cuda(lambda: 0.1), Cuda()

    def as_on_a_gpu(self, dst, src, stream):  # by address: nothing keeps the lease
        to, origin, nbytes = dst.data_ptr(), src.data_ptr(), src.numel() * src.element_size()
        stream.do(lambda: ctypes.memmove(to, origin, nbytes))

    monkeypatch.setattr(Cuda, "copy", as_on_a_gpu)
    first = StreamEngine(torch.device("cpu"), cuda=slow)
    other = first if second == "same" else StreamEngine(torch.device("cpu"), cuda=fast)
    engines = {torch.device("cuda:0"): first, torch.device("cpu"): other}
    monkeypatch.setattr(
        runtime,
        "_of_device",
        lambda: {d: (e, CrossCallPrefetch(e, d, runtime.pool().borrow)) for d, e in engines.items()},
    )
    src, dst = torch.full((1024,), 1.0), torch.zeros(1024)
    lease = runtime._host_lease(4096, -1, CPU)
    first.offload(src, lease, 0)
    first.offload_wait(src, lease, 0)
    first.prefetch(dst, lease, 0)
    first.prefetch_wait(dst, lease, 0)
    address = lease.data_ptr()
    del lease
    again, new = runtime._host_lease(4096, -1, CPU), torch.full((1024,), 2.0)
    assert again.data_ptr() == address
    runtime._offload(new, again, 0)
    runtime._offload_wait(new, again, 0)
    slow.compute.synchronize()
    fast.compute.synchronize()
    assert dst.unique().tolist() == [1.0]
    assert again.view(torch.float32).unique().tolist() == [2.0]
    slow.close()
    fast.close()
