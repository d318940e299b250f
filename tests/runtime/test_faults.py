"""Faults: each a clear error that leaves no lease and no copy behind, and the next step is right."""

import gc
import time

import pytest
import torch
from runtime import simulated
from runtime.simulated import Cuda
from test_contract import check, make, rows

import memo_compile
from memo_compile import errors
from memo_compile.runtime import calls, host, ops
from memo_compile.runtime.ops import engine, pool
from memo_compile.runtime.streams import StreamEngine
from memo_compile.runtime.threads import ThreadEngine

CPU = torch.device("cpu")
BACKEND = "memo_eager"  # the same calls stand around what Inductor emits; compiling is what takes time
OFFLOAD = {"offload": "all"}


@pytest.fixture
def trained():
    model = make()
    fn = torch.compile(model, backend=BACKEND, options=OFFLOAD)
    fn(rows()).square().mean().backward()
    model.zero_grad(set_to_none=True)
    yield model, fn
    gc.collect()
    assert (pool().leased_bytes, engine(CPU).pending) == (0, 0)
    model.zero_grad(set_to_none=True)
    fn(rows()).square().mean().backward()
    check(model, rows())


def raising(error, after=1):
    """Raises at its `after`-th call, and does what it replaces before."""

    def wrap(original):
        count = iter(range(after, -1, -1))

        def run(*args, **kwargs):
            if next(count, 0) == 0:
                raise error() if isinstance(error, type) else error
            return original(*args, **kwargs)

        return run

    return wrap


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["offload_wait", "prefetch_wait", "offload", "prefetch"])
def test_an_exception_between_a_start_and_its_wait(trained, monkeypatch, error, where):
    _, fn = trained
    mover = engine(CPU)
    with monkeypatch.context() as patch, mover.delays(lambda kind: 0.01):
        patch.setattr(mover, where, raising(error)(getattr(mover, where)))
        with pytest.raises(error):
            fn(rows()).square().mean().backward()
    assert mover.pending == 0


def test_an_exception_in_a_copy_worker_says_which_copy(trained):
    _, fn = trained

    def fail(kind):
        raise OSError("the link is down")

    with (
        engine(CPU).delays(fail),
        pytest.raises(errors.TransferFailed, match=r"D2H copy of .* failed: the link is down"),
    ):
        fn(rows())


def test_a_failed_read_of_a_block_does_not_stop_who_writes_to_it_next(trained):
    _, fn = trained

    def fail(kind):
        if kind == "H2D":
            raise OSError("the link is down")
        return 0

    with (
        engine(CPU).delays(fail),
        pytest.raises(errors.TransferFailed, match=r"H2D copy of .* failed: the link is down"),
    ):
        fn(rows()).square().mean().backward()


def test_an_exception_in_a_hook(trained):
    _, fn = trained
    x = rows().requires_grad_()
    loss = fn(x).square().mean()
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()


def test_no_host_memory(trained, monkeypatch):
    _, fn = trained
    memo_compile.empty_cache()
    with monkeypatch.context() as patch:
        patch.setattr(host, "free_host_memory", lambda: 1000)
        with pytest.raises(errors.HostMemoryUnavailable, match=r"1,000 are free.*host_budget"):
            fn(rows())


def test_an_arena_that_does_not_fit_any_more(trained, monkeypatch):
    _, fn = trained
    refusal = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 1 bytes")
    mover = engine(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(mover, "offload", raising(refusal)(mover.offload))
        with pytest.raises(errors.ArenaDoesNotFit, match=r"free on the device.*memory_budget"):
            fn(rows())


class Half:
    """A copy of four parts that fails at the third."""

    def __init__(self, cuda, name):
        self.calls, self.work = 0, getattr(cuda, name)
        setattr(cuda, name, self)

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("CUDA error")
        return self.work(*args)


@pytest.mark.parametrize("way", ["prefetch", "offload"])
def test_of_a_copy_that_fails_half_way_nothing_is_left_under_way(way):
    cuda = Cuda(lambda: 0.05)
    mover, lease = StreamEngine(CPU, cuda=cuda), torch.full((4 * 8 * 8 * 4,), 1, dtype=torch.uint8)
    whole = torch.zeros(4, 16, 8)
    Half(cuda, "copy")
    with pytest.raises(RuntimeError, match="CUDA error"):
        getattr(mover, way)(whole[:, :8], lease, 0)
    assert mover.pending == 0
    whole.fill_(7)  # freed, and another's by now
    lease.fill_(7)
    for stream in cuda.streams:
        stream.synchronize()
    assert whole.unique().tolist() == [7]
    assert lease.unique().tolist() == [7]
    cuda.close()


def test_of_a_copy_in_two_dimensions_that_fails_half_way_nothing_is_left_under_way(monkeypatch):
    cuda = Cuda(lambda: 0.05, two_dimensions=True)
    mover, lease = StreamEngine(CPU, cuda=cuda), torch.full((4 * 3 * 8 * 4,), 1, dtype=torch.uint8)
    whole = torch.zeros(3, 4, 16).permute(1, 0, 2)[:, :, :8]
    do = simulated.Stream.do
    count = iter(range(10))
    monkeypatch.setattr(simulated.Stream, "do", lambda self, work: 1 / (next(count) - 2) and do(self, work))
    with pytest.raises(ZeroDivisionError):
        mover.prefetch(whole, lease, 0)
    monkeypatch.undo()
    whole.fill_(7)
    for stream in cuda.streams:
        stream.synchronize()
    assert whole.unique().tolist() == [7]
    cuda.close()


def test_a_copy_that_is_interrupted_once_it_is_queued_is_waited_for(monkeypatch):
    mover, lease, place = ThreadEngine(), torch.ones(64, dtype=torch.uint8), torch.zeros(16)
    launch = mover._launch

    def interrupted(*args):
        launch(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(mover, "_launch", interrupted)
    with mover.delays(lambda kind: 0.05), pytest.raises(KeyboardInterrupt):
        mover.prefetch(place, lease, 0)
    place.fill_(7)
    time.sleep(0.1)
    assert place.unique().tolist() == [7]


def test_a_lost_device_does_not_hide_the_first_error(monkeypatch):
    cuda = Cuda()
    mover = StreamEngine(CPU, cuda=cuda)
    monkeypatch.setattr(cuda, "copy", raising(RuntimeError("the first"), after=0)(cuda.copy))
    for stream in cuda.streams:
        monkeypatch.setattr(stream, "synchronize", raising(RuntimeError("the second"), after=0)(stream.synchronize))
    with pytest.raises(RuntimeError, match="the first"):
        mover.prefetch(torch.zeros(4), torch.zeros(16, dtype=torch.uint8), 0)
    monkeypatch.undo()
    cuda.close()


def test_without_the_guard_copies_stay_behind(monkeypatch):
    """The guard is what the tests above rest on."""
    import contextlib

    monkeypatch.setattr(calls, "_nothing_left", lambda device: contextlib.nullcontext())
    fn = torch.compile(make(), backend=BACKEND, options=OFFLOAD)
    mover = engine(CPU)
    with monkeypatch.context() as patch, mover.delays(lambda kind: 0.5):
        patch.setattr(mover, "offload_wait", raising(ZeroDivisionError)(mover.offload_wait))
        with pytest.raises(ZeroDivisionError):
            fn(rows())
        assert mover.pending
    mover.drain()


def test_an_engine_is_made_once_for_a_device():
    assert ops.engine(CPU) is ops.engine(torch.device("cpu"))
