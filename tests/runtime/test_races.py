"""Races are provoked by delays, and every rule that prevents one is needed: without it a test here fails.

The same step runs on threads and on simulated streams: produce, offload, overwrite, prefetch, read, overwrite; with a
host block that is leased again while its last copies may still be under way.
"""

import random

import pytest
import torch
from runtime.simulated import Cuda

from memo_compile.errors import TransferFailed
from memo_compile.runtime.engine import Engine
from memo_compile.runtime.streams import StreamEngine
from memo_compile.runtime.threads import ThreadEngine

SLICES = 3
ROWS = 64
CPU = torch.device("cpu")


class OnThreads:
    """Computation happens where it is called."""

    def __init__(self, delay):
        self.engine = ThreadEngine()
        self._delays = self.engine.delays(lambda kind: delay())
        self._delays.__enter__()

    def do(self, work):
        work()

    def finish(self):
        self.engine.drain()


class OnStreams:
    """Computation is queued, as on a GPU."""

    def __init__(self, delay):
        self.cuda = Cuda(delay)
        self.engine = StreamEngine(CPU, cuda=self.cuda)

    def do(self, work):
        self.cuda.compute.do(work)

    def finish(self):
        for stream in self.cuda.streams:
            stream.synchronize()
        self.engine.drain()
        self.cuda.close()


def steps(machine, count=3):
    """Sums of what each step read back. One device buffer is written, offloaded, overwritten and landed in."""
    lease = torch.zeros(SLICES * ROWS * 4, dtype=torch.uint8)
    places = [torch.zeros(ROWS) for _ in range(SLICES)]
    landing = torch.zeros(ROWS)
    read = []
    for step in range(count):
        for i, place in enumerate(places):  # the forward
            machine.do(lambda place=place, value=100 * step + i + 1: place.fill_(value))
            machine.engine.offload(place, lease, i * ROWS * 4)
        for i, place in enumerate(places):
            machine.engine.offload_wait(place, lease, i * ROWS * 4)
            machine.do(lambda place=place: place.fill_(-1))  # its bytes are another's now
        for i in reversed(range(SLICES)):  # the backward, through one landing place
            machine.engine.prefetch(landing, lease, i * ROWS * 4)
            machine.engine.prefetch_wait(landing, lease, i * ROWS * 4)
            machine.do(lambda: read.append(float(landing.sum())))
            machine.do(lambda: landing.fill_(-7))
    machine.finish()
    return read


def expected(count=3):
    return [float(ROWS * (100 * step + i + 1)) for step in range(count) for i in reversed(range(SLICES))]


def delayed(kind, seed):
    draw = random.Random(seed)
    return kind(lambda: draw.choice([0.0, 0.0, 0.0005, 0.003]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", [OnThreads, OnStreams])
def test_delays_change_nothing(kind, seed):
    assert steps(delayed(kind, seed)) == expected()


def wrong(kind, seeds=range(12)):
    """Whether any of the delays gives another result, or an error."""
    for seed in seeds:
        try:
            if steps(delayed(kind, seed)) != expected():
                return True
        except TransferFailed:
            return True
    return False


def nothing(*args):
    return None


@pytest.mark.parametrize("rule", ["_await_producer", "_await_readers"])
def test_a_copy_waits_for_the_computation_before_it(monkeypatch, rule):
    monkeypatch.setattr(Engine, rule, nothing)
    assert wrong(OnStreams)


@pytest.mark.parametrize("kind", [OnThreads, OnStreams])
@pytest.mark.parametrize("wait", ["offload_wait", "prefetch_wait"])
def test_the_computation_waits_for_a_copy(monkeypatch, kind, wait):
    def forget(self, tensor, lease, offset):
        way = "D2H" if wait == "offload_wait" else "H2D"
        self._pending.pop(self._describe(way, tensor, lease, offset).key)

    monkeypatch.setattr(Engine, wait, forget)
    assert wrong(kind)


@pytest.mark.parametrize("kind", [OnThreads, OnStreams])
def test_a_prefetch_waits_for_the_offload_of_its_slice(monkeypatch, kind):
    """Where nothing overwrites the source, no wait of the computation stands between the two."""

    def there_and_back(machine):
        lease, src, dst = torch.zeros(ROWS * 4, dtype=torch.uint8), torch.ones(ROWS), torch.zeros(ROWS)
        machine.engine.offload(src, lease, 0)
        machine.engine.prefetch(dst, lease, 0)
        machine.engine.prefetch_wait(dst, lease, 0)
        got = []
        machine.do(lambda: got.append(float(dst.sum())))
        machine.finish()
        return got == [float(ROWS)]

    assert all(there_and_back(delayed(kind, seed)) for seed in range(12))
    monkeypatch.setattr(Engine, "_offload_of", nothing)
    assert not all(there_and_back(delayed(kind, seed)) for seed in range(40))


@pytest.mark.parametrize("kind", [OnThreads, OnStreams])
def test_a_block_that_is_leased_again_waits_for_its_last_readers(monkeypatch, kind):
    """The next forward's offload, on another stream, does not overtake the last prefetch from the same bytes."""

    def again(machine):
        lease = torch.zeros(ROWS * 4, dtype=torch.uint8)
        lease.view(torch.float32).fill_(5)
        dst, src = torch.zeros(ROWS), torch.full((ROWS,), 9.0)
        machine.engine.prefetch(dst, lease, 0)
        machine.engine.offload(src, lease, 0)
        machine.finish()
        return float(dst.sum()) == 5 * ROWS

    assert all(again(delayed(kind, seed)) for seed in range(12))
    monkeypatch.setattr(Engine, "_readers_of_block", nothing)
    assert not all(again(delayed(kind, seed)) for seed in range(40))


def test_a_block_goes_back_to_the_system_when_no_copy_touches_it(monkeypatch):
    machine = OnStreams(lambda: 0.02)
    lease, src = torch.zeros(ROWS * 4, dtype=torch.uint8), torch.ones(ROWS)
    machine.engine.offload(src, lease, 0)
    machine.engine.forget_block(lease.data_ptr())
    assert lease.view(torch.float32).sum() == ROWS
    machine.finish()


def test_leases_that_hooks_clone_hold_what_was_offloaded():
    machine = OnStreams(lambda: 0.02)
    lease, src = torch.zeros(ROWS * 4, dtype=torch.uint8), torch.ones(ROWS)
    machine.engine.offload(src, lease, 0)
    machine.engine.settle_offloads()
    assert lease.clone().view(torch.float32).sum() == ROWS
    machine.finish()


def test_what_is_copied_is_not_freed_before_it_is(monkeypatch):
    """The engine holds the source of a copy: nobody else may."""
    machine = OnThreads(lambda: 0.05)
    lease = torch.zeros(ROWS * 4, dtype=torch.uint8)
    machine.engine.offload(torch.ones(ROWS), lease, 0)
    torch.full((ROWS,), 3.0)  # would take the freed bytes
    machine.engine.drain()
    assert lease.view(torch.float32).sum() == ROWS
