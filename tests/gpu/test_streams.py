"""The stream engine on a GPU: what runs late there must not change a result."""

import gc

import pytest
import torch

import memo_compile
from memo_compile.runtime.engine import Engine
from memo_compile.runtime.ops import ahead, engine, pool, register

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
    """What is read back after a late producer, an early overwrite, and a late reader of the landing place."""
    mover = engine(device)
    lease = pool().lease(ROWS * 4)
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
    mover, lease = engine(device), pool().lease(4096)
    src = torch.arange(256.0, device=device).view(8, 32)
    dst = torch.zeros(8, 32, device=device)
    mover.offload(src[:, 4:20], lease, 0)
    mover.offload_wait(src[:, 4:20], lease, 0)
    mover.prefetch(dst[:, 4:20], lease, 0)
    mover.prefetch_wait(dst[:, 4:20], lease, 0)
    torch.testing.assert_close(dst[:, 4:20], src[:, 4:20])
    assert dst[:, :4].abs().sum() == 0


def test_token_rows_of_heads_move_without_a_temporary(device):
    mover, lease = engine(device), pool().lease(1 << 20)
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


@pytest.mark.parametrize("options", [{"offload": "all"}, {"memory_budget": "min"}, {"memory_budget": 0.7}])
def test_gradients(device, options):
    x = torch.randn(2048, 256, dtype=torch.float64, device=device)
    model = tower(device, options)
    for _ in range(3):
        for got, want in zip(step(model, x), step(tower(device), x), strict=True):
            torch.testing.assert_close(got, want)
    gc.collect()
    assert (pool().leased_bytes, engine(device).pending, ahead(device).outstanding) == (0, 0, 0)


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
    """The arena's addresses are fixed, and the host block is the graph's for as long as it is."""
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
    for _ in range(2):
        for p in model.parameters():
            p.grad.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for p, gradient in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_host_blocks_are_page_locked(device):
    lease = pool().lease(1 << 20)
    assert lease.is_pinned()
