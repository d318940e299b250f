"""Leases: a model whose blocks are compiled alone, one compilation for all of them."""

import contextlib
import gc
import itertools
import threading

import pytest
import torch

import memo_compile
from memo_compile.runtime.engine import key_of
from memo_compile.runtime.ops import cross_calls, engine, pool, recorder

CPU = torch.device("cpu")
BLOCKS = 12


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)

    def forward(self, x):
        return x + self.narrow(torch.sin(self.wide(x)))


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def rows(seed=1):
    """As an embedding gives them: they want a gradient, so that the first block is compiled like all others."""
    x = torch.randn(512, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def compiled():
    tower = Tower()
    for block in tower.blocks:
        block.compile(backend="memo", options={"offload": "all"})
    return tower


def step(tower, x):
    tower.zero_grad(set_to_none=True)
    tower(x).square().mean().backward()
    return [p.grad.clone() for p in tower.parameters()]


@pytest.fixture(scope="module")
def tower():
    tower = compiled()
    step(tower, rows())
    return tower


@pytest.fixture(autouse=True)
def _fresh():
    """One compilation for all tests here, in place of a reset between them."""
    yield
    gc.collect()


def test_one_compilation_serves_all_blocks_with_right_gradients(tower):
    assert len(memo_compile.plans()) == 1
    (plan,) = memo_compile.plans()
    assert all(a.offloaded == a.tokens for a in plan.activations if a.bytes >= 16384)
    for got, want in zip(step(tower, rows()), step(Tower(), rows()), strict=True):
        torch.testing.assert_close(got, want)


def test_no_more_than_two_arenas_are_held_and_all_is_returned(tower):
    (plan,) = memo_compile.plans()
    x = rows()
    peak = memo_compile.measure_peak(step, tower, x)
    between = (BLOCKS + 3) * x.numel() * 8  # what blocks hand to each other, and the loss's own
    gradients = 2 * sum(p.numel() * 8 for p in tower.parameters())
    assert peak <= 2 * plan.arena_bytes + between + gradients
    assert pool().leased_bytes == 0
    assert engine(CPU).pending == 0
    assert cross_calls(CPU).outstanding == 0


def test_each_blocks_slices_are_on_their_way_while_the_next_blocks_backward_runs(tower):
    recorder().trace = trace = []
    try:
        with engine(CPU).delays(lambda kind: 0.0):
            step(tower, rows())
    finally:
        recorder().trace = None
    backwards = [s for s in trace if s.kind == "backward"]
    assert len(backwards) == BLOCKS
    for running, following in itertools.pairwise(backwards):
        first = min(s.begin for s in trace if s.kind == "start H2D" and s.lease == following.lease)
        assert first < running.end


def test_a_thousand_steps_hold_the_same_bytes(tower):
    """Of two blocks: what could grow grows with calls, not with blocks."""
    few = torch.nn.Sequential(*tower.blocks[:2])
    held, peaks = [], []
    for number in range(1000):
        if number % 333:
            step(few, rows())
        else:
            gc.collect()  # else what a step before has left in circles is given back in this one
            peaks.append(memo_compile.measure_peak(step, few, rows()))
        held.append((pool().held_bytes, pool().leased_bytes, cross_calls(CPU).outstanding, engine(CPU).pending))
    assert set(held[1:]) == {held[1]}
    assert len(peaks) == 4
    assert max(peaks) < 1.1 * min(peaks)  # gradients of the step before go sooner or later


def test_delays_change_nothing(tower):
    import random

    expected = step(tower, rows())
    for seed in range(5):
        draw = random.Random(seed)
        with engine(CPU).delays(lambda kind, draw=draw: draw.choice([0, 0, 0.001, 0.004])):
            assert all(torch.equal(a, b) for a, b in zip(step(tower, rows()), expected, strict=True))


def waits_of(tower):
    """The waits in the emitted code: their kind, and the host offset that they name."""
    recorder().trace = trace = []
    try:
        step(tower, rows())
    finally:
        recorder().trace = None
    return sorted({(s.kind.removeprefix("wait "), s.offset) for s in trace if s.kind.startswith("wait")})


@contextlib.contextmanager
def without(monkeypatch, *removed):
    """As if the waits `removed` were not in the emitted code.

    Behind the wait for an offload its bytes are anyone's: here somebody takes them at once.
    """
    mover = engine(CPU)

    def replaced(kind, wait):
        def run(tensor, lease, offset):
            if (kind, offset) in removed:
                mover._pending.pop(key_of(kind, tensor, lease, offset))
            else:
                wait(tensor, lease, offset)
            if kind == "D2H":
                tensor.numpy().fill(float("nan"))

        return run

    with monkeypatch.context() as patch, mover.delays(lambda kind: 0.002):
        patch.setattr(mover, "offload_wait", replaced("D2H", mover.offload_wait))
        patch.setattr(mover, "prefetch_wait", replaced("H2D", mover.prefetch_wait))
        yield
    mover.drain()


def gradients_differ(tower, expected):
    """Or autograd has seen that a copy ended after the forward of its lease."""
    try:
        got = step(tower, rows())
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_each_wait_of_the_emitted_code_is_needed(tower, monkeypatch):
    expected = step(tower, rows())
    waits = waits_of(tower)
    assert {kind for kind, _ in waits} == {"D2H", "H2D"}
    with without(monkeypatch):
        assert not gradients_differ(tower, expected)
    for wait in waits:
        step(tower, rows(2))  # no prefetch buffer holds by chance what should land there
        with without(monkeypatch, wait):
            assert gradients_differ(tower, expected), wait


def test_two_towers_interleaved_and_in_two_threads(tower):
    expected = {seed: step(tower, rows(seed)) for seed in (1, 2)}
    other = compiled()
    a, b = tower(rows(1)).square().mean(), other(rows(2)).square().mean()
    tower.zero_grad(set_to_none=True)
    a.backward()
    b.backward()
    for model, seed in ((tower, 1), (other, 2)):
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected[seed], strict=True))
    results = {}
    threads = [
        threading.Thread(target=lambda m=m, s=s: results.update({s: step(m, rows(s))}))
        for m, s in ((tower, 1), (other, 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, want in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(results[seed], want, strict=True))


def test_a_dropped_loss_and_a_failing_hook_leave_nothing_behind(tower):
    loss = tower(rows()).square().mean()
    del loss
    x = rows()
    for i, block in enumerate(tower.blocks):
        x = block(x)
        if i == 5:
            x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        x.square().mean().backward()
    del x
    gc.collect()
    assert (pool().leased_bytes, engine(CPU).pending, cross_calls(CPU).outstanding) == (0, 0, 0)
    want = step(Tower(), rows())
    for got, expected in zip(step(tower, rows()), want, strict=True):
        torch.testing.assert_close(got, expected)
