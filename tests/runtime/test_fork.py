"""A forked child shares nothing with its parent: no host memory, no lock, no thread, and no lease."""

import ctypes
import gc
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from memo_compile import registry
from memo_compile.errors import LeaseOfAnotherProcess
from memo_compile.placement import kernel
from memo_compile.report import dumps
from memo_compile.runtime import blocks, ops, outstanding, threads
from memo_compile.runtime.host import HostPool
from memo_compile.workspaces.seen import seen

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def in_child(work, seconds=20):
    """Whether `work()` is true in a forked child; an error, or no answer in time, is not."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        good = False
        try:
            good = bool(work())
        finally:
            os._exit(0 if good else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refused(work, *args):
    try:
        work(*args)
    except LeaseOfAnotherProcess:
        return True
    return False


@pytest.fixture
def block():
    made = blocks.map_block(mmap.PAGESIZE, CPU)
    made.memory[:3] = b"abc"
    return made


def test_neither_sees_what_the_other_writes_to_a_block(block):
    def child():
        block.memory[:3] = b"xyz"
        return block.memory[:3] == b"xyz"

    assert in_child(child)
    assert block.memory[:3] == b"abc"


def test_a_childs_copy_of_a_block_is_empty_and_costs_no_memory(block):
    """As it stays readable, a view that the child still has is no crash, and the parent's pages need no copy."""
    assert in_child(lambda: block.memory[:3] == bytes(3))


def test_a_system_that_cannot_wipe_still_keeps_them_apart(monkeypatch):
    monkeypatch.setattr(blocks, "_WIPE_ON_FORK", 10**6)
    made = blocks.map_block(mmap.PAGESIZE, CPU)

    def child():
        made.memory[:3] = b"xyz"
        return True

    assert in_child(child)
    assert made.memory[:3] == bytes(3)


def test_a_child_has_a_pool_engines_and_counters_of_its_own():
    idle = ops.pool().lease(4096)
    address = idle.data_ptr()
    del idle
    before = ops.pool(), ops.engine(CPU), ops.cross_calls(CPU), ops.recorder()

    def child():
        after = ops.pool(), ops.engine(CPU), ops.cross_calls(CPU), ops.recorder()
        fresh = all(a is not b for a, b in zip(after, before, strict=True))
        return fresh and ops.pool().held_bytes == 0 and ops.pool().lease(4096).data_ptr() != address

    assert in_child(child)


class OfTheParentsDriver(threads.ThreadEngine):
    """Stands for streams and events: to destroy them in a child ends the process."""

    parent = os.getpid()

    def __del__(self):
        if os.getpid() != self.parent:
            os._exit(7)


def test_what_belongs_to_the_parents_driver_is_not_destroyed_in_a_child(monkeypatch):
    OfTheParentsDriver.parent = os.getpid()
    monkeypatch.setattr(ops, "_make_engine", lambda device: OfTheParentsDriver(ops.recorder()))
    ops._of_device.cache_clear()
    ops.engine(CPU)
    try:
        assert in_child(lambda: gc.collect() >= 0 and ops._of_device.cache_info().currsize == 0)
    finally:
        ops._of_device.cache_clear()


@pytest.mark.parametrize(
    "lock", [lambda: ops.pool()._lock, lambda: ops.engine(CPU)._lock, lambda: ops.recorder()._lock]
)
def test_a_lock_that_another_thread_holds_is_not_the_childs(lock):
    def child():
        lease, value = ops.pool().lease(64), torch.ones(4)
        ops.engine(CPU).offload(value, lease, 0)
        ops.engine(CPU).offload_wait(value, lease, 0)
        return lease[:16].view(torch.float32).sum() == 4

    with held_by_another_thread(lock()):
        assert in_child(child)


@pytest.mark.parametrize(
    ("lock", "work"),
    [
        (lambda: outstanding.ledger().lock, lambda: outstanding.ledger().held(CPU) >= 0),
        (lambda: seen().lock, lambda: seen().add({}) is None),
    ],
    ids=["ledger", "seen"],
)
def test_what_is_known_of_calls_and_ops_has_a_lock_of_the_childs(lock, work):
    with held_by_another_thread(lock()):
        assert in_child(work)


def test_the_registrys_lock_is_not_the_childs_and_its_plans_are():
    with held_by_another_thread(registry.registry().lock):
        count = registry.registry().count
        assert in_child(lambda: registry.registry().next_name() == f"graph_{count}")


class held_by_another_thread:  # noqa: N801
    def __init__(self, lock):
        self.lock, self.held, self.over = lock, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._hold, daemon=True)

    def _hold(self):
        with self.lock:
            self.held.set()
            self.over.wait(30)

    def __enter__(self):
        self.thread.start()
        assert self.held.wait(10)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def test_a_child_does_not_wait_for_the_thread_that_loads_the_placement_kernel(monkeypatch):
    kernel._loading.cache_clear()
    going_on = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_load", lambda: going_on.wait(30))
        kernel._loading()

        def child():
            kernel._load = lambda: None
            return kernel.load(5) is None and kernel._loading().done()

        assert in_child(child)
        going_on.set()
        kernel._loading().result()
    kernel._loading.cache_clear()


def test_a_child_writes_no_dump_where_its_parent_does(tmp_path):
    folder = dumps._own_folder(str(tmp_path), "graph_0")
    assert in_child(lambda: dumps._own_folder(str(tmp_path), "graph_0") != folder)
    assert dumps._own_folder(str(tmp_path), "graph_0") == folder


def test_the_bytes_of_a_parents_lease_are_refused_and_not_read_as_zeros():
    ops.register()
    memo, lease, value = torch.ops.memo, ops.pool().lease(64), torch.ones(4)
    memo.offload(value, lease, 0)
    memo.offload_wait(value, lease, 0)

    def child():
        return refused(memo.prefetch_, value, lease, 0) and refused(memo.offload, value, lease, 0)

    assert in_child(child)
    assert in_child(lambda: in_child(child)), "a grandchild"
    memo.prefetch_(value, lease, 0)
    memo.wait_(value, lease, 0)


def test_a_clone_of_a_lease_is_the_childs_own():
    """What hooks on saved tensors leave: torch's memory, whose bytes the child has."""
    lease = ops.pool().lease(64)
    lease.fill_(7)
    clone = lease.clone()
    assert in_child(lambda: ops.pool().check_own(clone) is None and clone.sum() == 7 * 64)


def test_an_address_is_refused_only_as_long_as_the_parents_lease_is_there():
    parents, mine = HostPool(), HostPool()
    lease = parents.lease(64)
    mine.disown(parents)
    with pytest.raises(LeaseOfAnotherProcess, match="in one process"):
        mine.check_own(lease)
    address = lease.data_ptr()
    del lease
    gc.collect()
    again = torch.frombuffer((ctypes.c_uint8 * 64).from_address(address), dtype=torch.uint8)
    mine.check_own(again)


SERVED = """
import os, signal
import torch

signal.alarm(100)
torch.set_num_threads(1)
weight = torch.randn(32, 32, requires_grad=True)
step = torch.compile(lambda x: torch.tanh(torch.tanh(x @ weight) @ weight).sum(), backend="memo_eager",
                     options={"offload": "all"})
data = {who: torch.randn(256, 32, generator=torch.Generator().manual_seed(who)) for who in (0, 1)}
want = {}
for who, x in data.items():
    step(x).backward()
    want[who], weight.grad = weight.grad, None
waiting = step(data[0])
turns = [os.pipe(), os.pipe()]
child = os.fork()
me = int(child == 0)
wrong = 0
for _ in range(5):  # each runs its backward when the other's forward has written
    weight.grad = None
    loss = step(data[me])
    os.write(turns[me][1], b".")
    os.read(turns[1 - me][0], 1)
    loss.backward()
    wrong += not torch.equal(weight.grad, want[me])
if child == 0:
    try:
        waiting.backward()
        wrong += 1
    except Exception as error:
        wrong += "in one process" not in str(error)
    os._exit(wrong)
weight.grad = None
waiting.backward()
assert torch.equal(weight.grad, want[0])
assert not wrong and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_parent_and_child_train_on_different_data_and_a_forward_of_the_parents_is_refused():
    done = subprocess.run([sys.executable, "-c", SERVED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_each_module_that_makes_a_lock_or_a_thread_says_what_a_child_does_without():
    """Those of one call's life alone are named here, with what they belong to."""
    of_one_call = {
        "hardware/calibration.py",  # workers within one measurement
        "passes/transforms/shared_heads.py",  # a thread that asks torch one question
        "placement/deadline.py",  # a timer within one solver's context
        "placement/search.py",  # workers within one search
        "progress.py",  # of one compilation
        "runtime/cross_call.py",  # of the devices' engines, which ops.py drops
        "runtime/engine.py",
        "runtime/host.py",
        "runtime/threads.py",
    }
    package = Path(blocks.__file__).parents[1]
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"threading\.(R?Lock|Thread|Timer|local|Condition)\b|PoolExecutor\(", path.read_text())
        and "register_at_fork" not in path.read_text()
    }
    assert found <= of_one_call, "see docs/internals.md"
