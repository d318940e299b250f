"""The stream engine on a GPU: what runs late there must not change a result."""

import contextlib
import gc
import os
import random
import threading
import time

import pytest
import torch

import memo_compile
from memo_compile import errors
from memo_compile.runtime import cudart
from memo_compile.runtime.engine import Engine, key_of
from memo_compile.runtime.ops import cross_calls, engine, pool, register
from memo_compile.runtime.streams import _Cuda

CYCLES = 20_000_000  # of torch.cuda._sleep: some ten milliseconds
ROWS = 1 << 20


@pytest.fixture
def device():
    register()
    return torch.device("cuda", torch.cuda.current_device())


def slept(work):
    torch.cuda._sleep(CYCLES)
    work()


def there_and_back(device):
    """What is read back after a late producer, an early overwrite, and a late reader of the prefetch buffer."""
    mover = engine(device)
    lease = pool().lease(ROWS * 4, device=device)
    src, landing = torch.zeros(ROWS, device=device), torch.ones(ROWS, device=device)
    slept(lambda: src.fill_(5))
    mover.offload(src, lease, 0)
    mover.offload_wait(src, lease, 0)
    src.fill_(-1)
    torch.cuda._sleep(CYCLES)
    read = landing.clone()  # the last reader of the place, late
    mover.prefetch(landing, lease, 0)
    mover.prefetch_wait(landing, lease, 0)
    result = landing.clone()
    torch.cuda.synchronize()
    return float(read.mean()), float(result.mean())


def test_late_producers_and_readers(device):
    assert there_and_back(device) == (1.0, 5.0)


@pytest.mark.parametrize("rule", ["_await_producer", "_await_readers"])
def test_each_rule_is_needed(device, monkeypatch, rule):
    monkeypatch.setattr(Engine, rule, lambda self: None)
    assert there_and_back(device) != (1.0, 5.0)


def test_a_copy_that_is_not_waited_for_is_seen(device, monkeypatch):
    monkeypatch.setattr(Engine, "prefetch_wait", lambda self, dst, lease, offset: None)
    assert there_and_back(device) != (1.0, 5.0)
    engine(device).drain()


def test_a_strided_slice_goes_there_and_back(device):
    mover, lease = engine(device), pool().lease(4096, device=device)
    src = torch.arange(256.0, device=device).view(8, 32)
    dst = torch.zeros(8, 32, device=device)
    mover.offload(src[:, 4:20], lease, 0)
    mover.offload_wait(src[:, 4:20], lease, 0)
    mover.prefetch(dst[:, 4:20], lease, 0)
    mover.prefetch_wait(dst[:, 4:20], lease, 0)
    torch.testing.assert_close(dst[:, 4:20], src[:, 4:20])
    assert dst[:, :4].abs().sum() == 0


def test_token_rows_of_heads_move_without_a_temporary(device):
    mover, lease = engine(device), pool().lease(1 << 20, device=device)
    src = torch.randn(2, 8, 1024, 16, device=device)
    dst = torch.zeros_like(src)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mover.offload(src[:, :, :512], lease, 0)
    mover.offload_wait(src[:, :, :512], lease, 0)
    mover.prefetch(dst[:, :, :512], lease, 0)
    mover.prefetch_wait(dst[:, :, :512], lease, 0)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before
    assert torch.equal(dst[:, :, :512], src[:, :, :512])


def test_token_rows_of_heads_are_one_copy(device, monkeypatch):
    mover, lease = engine(device), pool().lease(1 << 20, device=device)
    monkeypatch.setattr(mover._cuda, "copy", lambda *args: pytest.fail("a piece was copied"))
    src = torch.randn(2, 8, 1024, 16, device=device)
    mover.offload(src[:, :, :512], lease, 0)
    mover.offload_wait(src[:, :, :512], lease, 0)
    torch.cuda.synchronize()
    assert torch.equal(lease[: src.nbytes // 2].view(torch.float32).view(2, 8, 512, 16), src[:, :, :512].cpu())


def test_copies_in_two_dimensions_are_captured_and_replayed(device):
    mover, lease = engine(device), pool().lease(1 << 20, device=device)
    src, dst = torch.zeros(2, 8, 64, 16, device=device), torch.zeros(2, 8, 64, 16, device=device)

    def move():
        mover.offload(src[:, :, :32], lease, 0)
        mover.offload_wait(src[:, :, :32], lease, 0)
        mover.prefetch(dst[:, :, :32], lease, 0)
        mover.prefetch_wait(dst[:, :, :32], lease, 0)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        move()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move()
    for value in (1, 2):
        src.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert dst[:, :, :32].unique().tolist() == [value]
    assert dst[:, :, 32:].abs().sum() == 0


def test_a_refused_page_lock_leaves_no_error_for_the_next_kernel(device):
    lease = pool().lease(1 << 20, device=device)
    assert cudart.page_lock(lease.data_ptr(), 1 << 20) != 0, "registered already"
    assert torch.ones(4, device=device).sum() == 4


def test_a_kernels_launch_takes_the_error_where_the_library_is_not_found(device, monkeypatch):
    lease = pool().lease(1 << 20, device=device)
    monkeypatch.setattr(cudart, "library", lambda: None)
    assert cudart.page_lock(lease.data_ptr(), 1 << 20) != 0
    assert torch.ones(4, device=device).sum() == 4


def test_the_cpus_blocks_are_not_page_locked(device):
    assert not pool().lease(1 << 20).is_pinned()


def test_a_forked_child_leaves_the_parents_blocks_alone(device):
    lease, value = pool().lease(1 << 20, device=device), torch.ones(1 << 18, device=device)
    engine(device).offload(value, lease, 0)
    engine(device).offload_wait(value, lease, 0)
    torch.cuda.synchronize()
    child = os.fork()
    if child == 0:
        os._exit(int(lease.sum() != 0 or pool().held_bytes != 0))
    assert os.waitpid(child, 0)[1] == 0
    assert lease.view(torch.float32).sum() == 1 << 18
    value.zero_()
    engine(device).prefetch(value, lease, 0)
    engine(device).prefetch_wait(value, lease, 0)
    assert value.sum() == 1 << 18


def test_no_prefetch_buffer_ahead_makes_the_allocator_try_again(device):
    memo_compile.empty_cache()
    _, total = torch.cuda.mem_get_info(device)
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + (64 << 20)) / total, device)
    try:
        assert engine(device).spare(128 << 20, device) is None
        assert engine(device).spare(16 << 20, device) is not None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert torch.cuda.memory_stats(device)["num_alloc_retries"] == retries


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256)

    def forward(self, x):
        return x + self.narrow(torch.sin(self.wide(x)))


def tower(device, options=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block() for _ in range(6))).double().to(device)
    for block in model:
        if options is not None:
            block.compile(backend="memo", options=options)
    return model


def step(model, x):
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def rows(device, seed=1):
    """They want a gradient, so that the first block is compiled like all others."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(2048, 256, dtype=torch.float64, device=device, generator=generator)
    return x.requires_grad_()


NOTHING = {"leased bytes": 0, "pending copies": 0, "outstanding calls": 0}


def what_is_left(device):
    """Of all calls so far. Autograd's own thread may let go of what it ran a moment after the caller goes on."""
    for _ in range(50):
        gc.collect()
        torch.cuda.synchronize()
        counts = (pool().leased_bytes, engine(device).pending, cross_calls(device).outstanding)
        if not any(counts):
            break
        time.sleep(0.1)
    return dict(zip(NOTHING, counts, strict=True))


class Late(_Cuda):
    """CUDA, with pauses drawn from a seed before copies."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def copy(self, dst, src, stream):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self.draw.choice([1, 1, CYCLES // 20, CYCLES // 5]))
        _Cuda.copy(dst, src, stream)

    def copy_planes(self, flat, kind, stream):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self.draw.choice([1, CYCLES // 20]))
        return _Cuda.copy_planes(flat, kind, stream)


def test_delays_change_nothing(device, monkeypatch):
    model, x = tower(device, {"offload": "all"}), rows(device)
    expected = step(model, x)
    for seed in range(10):
        monkeypatch.setattr(engine(device), "_cuda", Late(seed))
        assert all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True)), seed
    assert what_is_left(device) == NOTHING


@pytest.mark.parametrize("wait", ["offload_wait", "prefetch_wait"])
def test_without_waits_delays_are_seen(device, monkeypatch, wait):
    """`prefetch_wait` reads what has not landed; after `offload_wait` the bytes are anyone's."""
    model, x = tower(device, {"offload": "all"}), rows(device)
    expected = step(model, x)
    step(model, rows(device, seed=2))
    way = {"offload_wait": "D2H", "prefetch_wait": "H2D"}[wait]
    mover = engine(device)

    def forget(tensor, lease, offset):
        mover._pending.pop(key_of(way, tensor, lease, offset))
        if way == "D2H":
            tensor.view(torch.uint8).fill_(255)

    monkeypatch.setattr(mover, "_cuda", Late(0))
    monkeypatch.setattr(mover, wait, forget)
    try:
        differs = not all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True))
    except RuntimeError as error:  # autograd may see that a saved value was written
        differs = "modified by an inplace operation" in str(error)
    torch.cuda.synchronize()
    assert differs


def test_no_more_than_two_arenas_are_held(device):
    model, x = tower(device, {"offload": "all"}), rows(device)
    step(model, x)
    plan = memo_compile.plans()[-1]
    peak = memo_compile.measure_peak(step, model, x)
    between = (len(model) + 3) * x.numel() * 8  # what blocks hand to each other, and the loss's own
    gradients = 2 * sum(p.numel() * 8 for p in model.parameters())
    assert peak <= 2 * plan.arena_bytes + between + gradients
    assert what_is_left(device) == NOTHING


def test_two_threads_with_streams_of_their_own(device):
    models = {seed: tower(device, {"offload": "all"}) for seed in (1, 2)}
    expected = {seed: step(model, rows(device, seed)) for seed, model in models.items()}
    inputs = {seed: rows(device, seed) for seed in models}
    torch.cuda.synchronize()
    found = {}

    def run(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[seed] = step(models[seed], inputs[seed])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, want in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[seed], want, strict=True))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["offload", "offload_wait", "prefetch", "prefetch_wait"])
def test_a_fault_leaves_nothing_behind_and_the_next_step_is_right(device, monkeypatch, where, error):
    model, x = tower(device, {"offload": "all"}), rows(device)
    expected = step(model, x)

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine(device), where, fail)
        with pytest.raises(error):
            step(model, x)
    assert what_is_left(device) == NOTHING
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True))


def test_a_dropped_loss_and_a_failing_hook_leave_nothing_behind(device):
    model, x = tower(device, {"offload": "all"}), rows(device)
    expected = step(model, x)
    loss = model(x).square().mean()
    del loss
    assert what_is_left(device) == NOTHING
    y = model[:3](x)
    y.register_hook(lambda grad: 1 / 0)
    loss = model[3:](y).square().mean()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    del y, loss
    assert what_is_left(device) == NOTHING
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True))


def all_that_is_left(device):
    """Tensors in every hole of the blocks that the allocator holds already."""
    taken = []
    for size in (16 << 20, 4 << 20, 2 << 20, 1 << 20, 1 << 16):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device=device))
    return taken


def test_an_arena_that_does_not_fit_any_more_is_a_clear_error(device):
    model, x = tower(device, {"offload": "all"}), rows(device)
    expected = step(model, x)
    gc.collect()
    memo_compile.empty_cache()
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total, device)
    taken = all_that_is_left(device)
    try:
        with pytest.raises((errors.ArenaDoesNotFit, torch.OutOfMemoryError)):
            step(model, x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        taken.clear()
    assert what_is_left(device) == NOTHING
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True))


@pytest.mark.parametrize("options", [{"offload": "all"}, {"memory_budget": "min"}, {"memory_budget": 1.0}])
def test_gradients(device, options):
    x = torch.randn(2048, 256, dtype=torch.float64, device=device)
    model = tower(device, options)
    for _ in range(3):
        for got, want in zip(step(model, x), step(tower(device), x), strict=True):
            torch.testing.assert_close(got, want)
    gc.collect()
    assert (pool().leased_bytes, engine(device).pending, cross_calls(device).outstanding) == (0, 0, 0)


def test_gradients_on_a_stream_of_the_users(device):
    x = torch.randn(2048, 256, dtype=torch.float64, device=device)
    model = tower(device, {"offload": "all"})
    want = step(tower(device), x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_measured_peak_is_the_plans(device):
    x = torch.randn(2048, 256, dtype=torch.float64, device=device)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block() for _ in range(6))).double().to(device)
    fn = torch.compile(model, backend="memo", options={"memory_budget": 0.6})

    def run():
        fn(x).square().mean().backward()

    run()
    model.zero_grad(set_to_none=True)
    peak = memo_compile.measure_peak(run)
    assert peak <= 1.05 * memo_compile.plans()[-1].predicted_peak + 4 * x.numel() * 8


def test_a_captured_step_replays(device):
    """The arena's addresses are fixed, and the host block is the graph's, whatever else is reset."""
    x = torch.randn(2048, 256, dtype=torch.float64, device=device)
    model = tower(device, {"offload": "all"})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            want = step(model, x)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
    memo_compile.reset()
    for _ in range(2):
        for p in model.parameters():
            p.grad.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for p, gradient in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_host_blocks_are_page_locked(device):
    lease = pool().lease(1 << 20, device=device)
    assert lease.is_pinned()
