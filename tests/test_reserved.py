"""With memory_budget="auto" a plan stays within what torch's allocator may take of the device, and trains the same.

The allocator is a device's; the step runs on the CPU. Pages are small, as the model is.
"""

import pytest
import torch

import memo_compile
from memo_compile.hardware import caching_allocator
from memo_compile.hardware.device_memory import Allocator
from memo_compile.trace import setting

PAGE = 4096
LEFT = 3_800_000  # bytes


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, x):
        return x + self.narrow(torch.sin(self.wide(x)))


def step(model, run, x):
    model.zero_grad(set_to_none=True)
    run(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def left_on_the_device(monkeypatch):
    for name, value in {"SMALL": 0, "LARGE_FROM": 0, "LARGE_SEGMENT": PAGE, "LARGE_ROUNDING": PAGE}.items():
        monkeypatch.setattr(caching_allocator, name, value)
    monkeypatch.setattr(setting, "_given", lambda _: setting.Given(LEFT, allocator=Allocator.SEGMENTS))


def test_auto_plans_with_what_is_reserved(left_on_the_device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block() for _ in range(4))).double()
    x = torch.randn(1024, 16, dtype=torch.float64)
    run = torch.compile(model, backend="memo", options={"memory_budget": "auto"})
    expected, got = step(model, model, x), step(model, run, x)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    plan = memo_compile.plans()[-1]
    assert plan.predicted_peak < plan.predicted_reserved <= LEFT < plan.unplanned_peak
    model.zero_grad(set_to_none=True)
    held = memo_compile.measure_peak(lambda: run(x).square().mean().backward())
    assert held <= plan.predicted_peak + 4096
