"""The thread engine: copies beside the computation, in the order that its waits ask for."""

import time

import pytest
import torch

from memo_compile.errors import TransferFailed
from memo_compile.runtime.engine import Recorder
from memo_compile.runtime.threads import ThreadEngine


@pytest.fixture
def engine():
    return ThreadEngine(Recorder())


def test_there_and_back(engine):
    src, lease, dst = torch.randn(8, 4), torch.empty(256, dtype=torch.uint8), torch.empty(8, 4)
    engine.offload(src, lease, 64)
    engine.offload_wait(src, lease, 64)
    src.zero_()
    engine.prefetch(dst, lease, 64)
    engine.prefetch_wait(dst, lease, 64)
    assert torch.equal(lease[64:192].view(torch.float32).view(8, 4), dst)
    assert dst.abs().sum() > 0
    assert engine.recorder.stats.bytes_out == engine.recorder.stats.bytes_in == 128


def test_a_strided_slice_lies_dense_on_the_host(engine):
    src, lease = torch.arange(24.0).view(4, 6), torch.empty(64, dtype=torch.uint8)
    engine.offload(src[:, 1:4], lease, 0)
    engine.offload_wait(src[:, 1:4], lease, 0)
    assert torch.equal(lease[:48].view(torch.float32).view(4, 3), src[:, 1:4])


def test_copies_run_beside_the_computation(engine):
    src, lease = torch.randn(64), torch.empty(256, dtype=torch.uint8)
    with engine.delays(lambda kind: 0.2):
        begin = time.perf_counter()
        engine.offload(src, lease, 0)
        started = time.perf_counter() - begin
        engine.offload_wait(src, lease, 0)
        waited = time.perf_counter() - begin
    assert started < 0.1 < waited


def test_a_failed_copy_is_an_error_where_it_is_waited_for(engine):
    src, lease = torch.randn(64), torch.empty(256, dtype=torch.uint8)

    def fail(kind):
        raise OSError("no more")

    with engine.delays(fail):
        engine.offload(src, lease, 0)
        with pytest.raises(TransferFailed, match="no more"):
            engine.offload_wait(src, lease, 0)
    engine.offload(src, lease, 0)
    engine.offload_wait(src, lease, 0)
    assert engine.pending == 0


def test_a_wait_without_a_copy_is_an_error(engine):
    with pytest.raises(TransferFailed, match="never started"):
        engine.prefetch_wait(torch.empty(4), torch.empty(16, dtype=torch.uint8), 0)


def test_drain_forgets_what_was_left_behind(engine):
    src, lease = torch.randn(64), torch.empty(256, dtype=torch.uint8)
    engine.offload(src, lease, 0)
    engine.drain()
    assert engine.pending == 0
