"""Races are provoked by delays, and every rule that prevents one is needed: without it a test here fails.

The same step runs on threads and on simulated streams: produce, offload, overwrite, prefetch, read, overwrite; with a
host block that is leased again while its last copies may still be under way.
"""

import gc
import random
import threading

import pytest
import torch
from runtime.simulated import Cuda

from memo_compile.errors import TransferFailed
from memo_compile.runtime.cross_call import CrossCallPrefetch, EarlyPrefetch, Schedule
from memo_compile.runtime.engine import Engine, key_of
from memo_compile.runtime.host import HostPool
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
        for i in reversed(range(SLICES)):  # the backward, through one prefetch buffer
            machine.engine.prefetch(landing, lease, i * ROWS * 4)
            machine.engine.prefetch_wait(landing, lease, i * ROWS * 4)
            machine.do(lambda: read.append(float(landing.sum())))
            machine.do(lambda: landing.fill_(-7))
    machine.finish()
    return read


def expected(count=3):
    return [float(ROWS * (100 * step + i + 1)) for step in range(count) for i in reversed(range(SLICES))]


# Where a rule is taken away the race has to be seen: longer than a busy machine lets a thread wait for its turn.
RACING = 0.05


def delayed(kind, seed, longest=0.003):
    draw = random.Random(seed)
    return kind(lambda: draw.choice([0.0, 0.0, 0.0005, longest]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", [OnThreads, OnStreams])
def test_delays_change_nothing(kind, seed):
    assert steps(delayed(kind, seed)) == expected()


def wrong(kind, seeds=range(12)):
    """Whether any of the delays gives another result, or an error."""
    for seed in seeds:
        try:
            if steps(delayed(kind, seed, RACING)) != expected():
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
        self._pending.pop(key_of(way, tensor, lease, offset))

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
    assert not all(there_and_back(delayed(kind, seed, RACING)) for seed in range(40))


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
    assert not all(again(delayed(kind, seed, RACING)) for seed in range(40))


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
    machine.engine.finish_offloads()
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


class Held:
    """Stops the thread of this name inside of what it wraps, until it is let go."""

    def __init__(self, work, name):
        self.work, self.name = work, name
        self.inside, self.go = threading.Event(), threading.Event()

    def __call__(self, *args):
        if threading.current_thread().name == self.name and not self.inside.is_set():
            self.inside.set()
            assert self.go.wait(10)
        return self.work(*args)


def in_threads(**works):
    """Each in a thread of its name; waits for all, and says whether all have ended."""
    threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in works.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


PREFETCH_BUFFER = EarlyPrefetch("b", 0, ROWS * 4, torch.float32, (ROWS,), (1,), 0)


class TwoCalls:
    """Two calls' leases, with 5 and 6 in them; the backward of the second starts what the first prefetches."""

    def __init__(self):
        self.pool, self.engine = HostPool(), ThreadEngine()
        self.cross_calls = CrossCallPrefetch(self.engine, CPU, self.pool.borrow)
        self.first, self.second = self.pool.lease(ROWS * 4), self.pool.lease(ROWS * 4)
        for lease, value in ((self.first, 5.0), (self.second, 6.0)):
            self.engine.offload(torch.full((ROWS,), value), lease, 0)
        self.engine.drain()
        for lease in (self.first, self.second):
            self.cross_calls.made(lease, Schedule((PREFETCH_BUFFER,), 1))

    def backward(self, lease):
        """Where its slice has landed."""
        self.cross_calls.begins(lease)
        base = self.cross_calls.place(lease, 0)
        place = base.view(torch.float32) if base is not None else torch.empty(ROWS)
        if not self.cross_calls.adopt(place, lease, 0):
            self.engine.prefetch(place, lease, 0)
        self.cross_calls.passed(lease)
        self.engine.prefetch_wait(place, lease, 0)
        return place


def test_a_slice_that_is_on_its_way_ahead_is_taken_over():
    calls = TwoCalls()
    calls.backward(calls.second)
    assert calls.engine.pending == 1
    assert calls.backward(calls.first).sum() == 5 * ROWS
    assert calls.engine.recorder.stats.copies_in == 2


def test_a_call_that_has_started_all_is_forgotten():
    calls = TwoCalls()
    calls.backward(calls.second)
    assert calls.cross_calls.outstanding == 1
    assert calls.backward(calls.second).sum() == 6 * ROWS, "its graph was kept"


def test_a_prefetch_buffer_is_handed_over_when_its_copy_has_started(monkeypatch):
    """Else the copy starts after the backward's own, and writes over what lies there by then."""
    calls = TwoCalls()
    held = Held(calls.engine.prefetch, "second")
    result = []

    def first():
        assert held.inside.wait(10)
        place = calls.backward(calls.first)
        place.fill_(-3.0)  # a gradient in place of the activation
        held.go.set()
        result.append(place)

    # Not its own prefetch: that of the lease before.
    own = calls.engine.prefetch
    monkeypatch.setattr(
        calls.engine,
        "prefetch",
        lambda dst, lease, offset: (held if lease.data_ptr() == calls.first.data_ptr() else own)(dst, lease, offset),
    )
    assert in_threads(second=lambda: calls.backward(calls.second), first=first)
    calls.engine.drain()
    assert result[0].sum() == -3 * ROWS


def test_what_was_started_ahead_too_late_leaves_nothing_behind(monkeypatch):
    """Its place goes back to the allocator when the copy to it has ended."""
    calls = TwoCalls()
    prefetch = calls.engine.prefetch

    def begins_meanwhile(dst, lease, offset):
        prefetch(dst, lease, offset)
        if lease.data_ptr() == calls.first.data_ptr():
            calls.cross_calls.begins(lease)

    monkeypatch.setattr(calls.engine, "prefetch", begins_meanwhile)
    with calls.engine.delays(lambda kind: 0.02):
        calls.backward(calls.second)
    assert calls.engine.pending == 0
    assert calls.cross_calls.place(calls.first, 0) is None


def test_of_two_reads_of_a_block_the_next_writer_waits_for_the_later(monkeypatch):
    """Started from two threads, and noted in the order in which they were started."""
    engine, lease = ThreadEngine(), torch.zeros(ROWS * 4, dtype=torch.uint8)
    places = {name: torch.zeros(ROWS) for name in ("one", "two")}
    remember = Held(Engine._remember.__get__(engine), "one")
    monkeypatch.setattr(engine, "_remember", remember)

    def one():
        engine.prefetch(places["one"], lease, 0)

    def two():
        assert remember.inside.wait(10)
        threading.Timer(0.2, remember.go.set).start()
        engine.prefetch(places["two"], lease, 0)

    assert in_threads(one=one, two=two)
    assert engine._last_read[lease.data_ptr()].device == places["two"].data_ptr()
    engine.drain()


@pytest.mark.parametrize("who", ["pool", "engine", "cross_calls"])
def test_what_is_collected_takes_no_lock(who):
    """It may be so in any thread at any time: here in one that another waits for."""
    calls = TwoCalls()
    pool = HostPool(on_return=lambda address: (calls.cross_calls.forget(address), calls.engine.forget_lease(address)))
    held, over, lease = threading.Event(), threading.Event(), [pool.lease(1000)]
    lock = {"pool": pool, "engine": calls.engine, "cross_calls": calls.cross_calls}[who]._lock

    def holder():
        with lock:
            held.set()
            over.wait(10)

    def collector():
        assert held.wait(10)
        lease.clear()
        over.set()

    assert in_threads(holder=holder, collector=collector)
    assert over.is_set()
    assert pool.leased_bytes == 0


def test_what_is_collected_is_forgotten_before_its_block_serves_again():
    calls = TwoCalls()
    pool = HostPool(on_return=calls.cross_calls.forget)
    lease = pool.lease(1000)
    address = lease.data_ptr()
    calls.cross_calls.made(lease, Schedule((), 0))
    before = calls.cross_calls.outstanding
    del lease
    gc.collect()
    assert calls.cross_calls.outstanding == before, "it leaves a note, and calls nobody"
    again = pool.lease(1000)
    assert again.data_ptr() == address
    assert calls.cross_calls.outstanding == before - 1


def test_two_threads_and_a_collection_in_the_middle_of_a_start_end():
    """One starts a copy and collects a lease there, the other frees a block that a copy has used."""
    engine = ThreadEngine()
    pool = HostPool(on_return=engine.forget_lease, before_free=engine.forget_block)
    used, circle, other = pool.lease(4096), [pool.lease(1000)], pool.lease(64)
    engine.offload(torch.ones(8), used, 0)
    engine.drain()
    del used
    circle.append(circle)
    inside, launch = threading.Event(), engine._launch

    def slow(*args):
        nonlocal circle
        inside.set()
        threading.Event().wait(0.2)
        circle = None
        gc.collect()
        return launch(*args)

    engine._launch = slow

    def forward():
        assert inside.wait(10)
        pool.lease(2000, budget=pool.held_bytes)

    assert in_threads(backward=lambda: engine.prefetch(torch.zeros(8), other, 0), forward=forward)
    engine.drain()
