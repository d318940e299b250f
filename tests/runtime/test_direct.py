"""Emitted code calls memo's transfers as functions; a profiler still sees them."""

import torch
from torch.profiler import ProfilerActivity, profile

import memo_compile
from memo_compile.codegen.emitted.direct import direct

TRANSFERS = ("offload", "offload_wait", "prefetch_", "wait_")


def test_transfers_pass_by_the_dispatcher_unless_a_profiler_looks_on(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) if i % 2 else torch.nn.Tanh() for i in range(8))).double()
    x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    options = {"memory_budget": "min", "recompute": False}
    compiled = torch.compile(model, backend="memo", dynamic=False, options=options)
    wanted = torch.autograd.grad(model(x).square().sum(), x)

    def step():
        torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), wanted)

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    seen = {event.key for event in profiled.key_averages()}
    assert {f"memo::{name}" for name in TRANSFERS} <= seen

    before = memo_compile.transfer_stats()
    for name in TRANSFERS:
        monkeypatch.setattr(getattr(torch.ops.memo, name), "default", None)
    step()
    assert memo_compile.transfer_stats().copies_in > before.copies_in


def test_what_moves_nothing_imports_nothing():
    lines = ["    buf1 = torch.ops.memo.keep.default(buf0)"]
    assert direct(lines) == ([], lines)
