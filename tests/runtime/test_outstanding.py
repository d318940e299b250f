"""A budget is for all calls of a graph that wait for their backward at once, however they come about."""

import threading

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import memo_compile
from memo_compile.errors import BudgetTooSmall, HostBudgetTooSmall
from memo_compile.models import LlamaConfig
from memo_compile.models.llama import Block, rotary_tables
from memo_compile.planning.residency import Activation, Problem, memory_profile
from memo_compile.planning.rounding import decide, smallest_peak
from memo_compile.planning.simulate import simulate
from memo_compile.runtime.outstanding import ledger

LAYERS, TOKENS, KIB = 3, 512, 1024
LOSS = 64  # bytes: a scalar, and what it starts from


class Chain(nn.Module):
    """Blocks of a Llama one after another."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(width=64, heads=2, kv_heads=1, ffn=256)
        self.blocks = nn.ModuleList(Block(config) for _ in range(LAYERS))

    def forward(self, x, cos, sin):
        for block in self.blocks:
            x = block(x, cos, sin)
        return x


def blocks(options, *, alone):
    """A chain whose blocks are compiled one by one, or which is compiled whole; and its step. Gradients are there."""
    torch._dynamo.reset()
    memo_compile.reset()
    torch.manual_seed(0)
    model = Chain()
    run = model if alone else torch.compile(model, backend="memo_eager", options=options)
    if alone:
        for block in model.blocks:
            block.compile(backend="memo_eager", options=options)
    x = torch.randn(1, TOKENS, 64)
    tables = rotary_tables(TOKENS, 32, 10000.0, x)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model, lambda: run(x, *tables).sum().backward()


def held(options, *, alone):
    _, step = blocks(options, alone=alone)
    step()
    return memo_compile.measure_peak(step)


def test_blocks_compiled_alone_hold_what_the_whole_model_holds():
    options = {"memory_budget": "min", "host_budget": 1 << 20}
    alone = held(options, alone=True)
    first, others = memo_compile.plans()  # the first block's input wants no gradient
    assert (first.calls, others.calls) == (LAYERS, LAYERS - 1)
    assert 0 < first.host_bytes + (LAYERS - 1) * others.host_bytes <= 1 << 20
    assert not any(ledger().outstanding(call.kept.graph) for call in ledger().calls), "the step is over"
    assert alone <= 1.1 * held(options, alone=False)


def test_host_memory_for_all_blocks_is_refused_before_the_first_has_run():
    model, step = blocks({"offload": "all", "host_budget": 2 << 20}, alone=True)
    ran = []
    model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(BackendCompilerFailed) as refused:
        step()
    error = refused.value.inner_exception
    assert isinstance(error, HostBudgetTooSmall)
    assert error.calls == LAYERS
    assert error.nbytes <= error.budget < LAYERS * error.nbytes
    assert not ran


def test_a_budget_in_bytes_is_for_all_blocks_or_refused():
    assert held({"memory_budget": 4 << 20}, alone=True) <= (4 << 20) + LOSS
    assert [plan.offloaded_bytes + plan.recomputed_bytes > 0 for plan in memo_compile.plans()] == [True, True]
    _, step = blocks({"memory_budget": 2 << 20}, alone=True)
    with pytest.raises(BackendCompilerFailed) as refused:
        step()
    assert isinstance(refused.value.inner_exception, BudgetTooSmall)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x.square().mean()


def microbatches(options, backend, count=3):
    """`count` calls of one compiled model before any backward, as in a pipeline. Gradients, and what a step held."""
    torch._dynamo.reset()
    memo_compile.reset()
    model = Net().double()
    run = torch.compile(model, backend=backend, options=options) if backend else model
    data = [torch.full((512, 64), float(i), dtype=torch.float64) for i in range(count)]

    def step():
        model.zero_grad(set_to_none=True)
        for loss in [run(x) for x in data]:
            loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    peak = memo_compile.measure_peak(step)
    return [p.grad for p in model.parameters()], peak


@pytest.mark.parametrize(("backend", "count", "plans"), [("memo_eager", 3, [1, 2, 4]), ("memo", 2, [1, 2])])
def test_more_calls_than_were_planned_for_are_learned_in_the_first_step(backend, count, plans, caplog):
    wanted, eager = microbatches(None, None, count)
    budget = int(0.6 * eager)
    got, peak = microbatches({"memory_budget": budget}, backend, count)
    assert memo_compile.plans()[-1].calls == plans[-1]
    assert sum("wait for their backward" in r.getMessage() for r in caplog.records) == len(plans) - 1
    assert peak <= budget
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)


def test_calls_that_are_told_are_planned_for_at_once(caplog):
    _, eager = microbatches(None, None)
    _, peak = microbatches({"memory_budget": int(0.6 * eager), "calls": 3}, "memo_eager")
    assert [plan.calls for plan in memo_compile.plans()] == [3]
    assert not [r for r in caplog.records if "wait for their backward" in r.getMessage()]
    assert peak <= 0.6 * eager


def stack(calls, budget=None):
    """Six layers, a tenth of whose bytes stay whatever is decided."""
    n = 6
    activations = tuple(Activation(f"a{i}", 64 * KIB, 64, i, i, 11 - i, 11 - i, 1e-3) for i in range(n))
    return Problem((1e-3,) * 12, (KIB,) * 12, n, activations, budget, 1 << 20, 1e9, 1e9, calls=calls)


def test_the_program_counts_what_the_calls_before_keep():
    """For one call there is room for two layers; with three calls before it, each keeps a quarter of that."""
    for calls in (1, 4):
        problem = stack(calls, budget=193 * KIB)
        decision = decide(problem)
        kept = sum(a.bytes * decision.residency[a.name].kept // a.tokens for a in problem.activations)
        assert calls * kept <= 193 * KIB
        assert max(memory_profile(problem, decision.residency)) <= decision.peak + 1
        assert simulate(problem, decision.residency).fits
    assert smallest_peak(stack(4)) == smallest_peak(stack(1))


def test_threads_that_plan_again_take_turns():
    """Tracing keeps state that all threads share: hooks, patched modules, flags."""
    torch._dynamo.reset()
    memo_compile.reset()
    torch.manual_seed(0)
    halves = [nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)]).double() for _ in range(2)]
    x = torch.randn(64, 16, dtype=torch.float64)

    def run(fn):
        return fn(x).sin().sum()

    step = torch.compile(run, backend="memo_eager", dynamic=False, options={"memory_budget": 1.0})
    wanted = [torch.autograd.grad(run(half), list(half.parameters())) for half in halves]
    for half in halves:
        step(half).backward()
    got: dict[int, list] = {}
    together = threading.Barrier(len(halves))

    def work(number):
        together.wait()
        losses = [step(halves[number]) for _ in range(3)]
        got[number] = [torch.autograd.grad(loss, list(halves[number].parameters())) for loss in losses]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(halves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, gradients in enumerate(wanted):
        for each in got[number]:
            torch.testing.assert_close(each, gradients, rtol=1e-10, atol=1e-12)
