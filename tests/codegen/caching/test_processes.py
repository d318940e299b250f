"""What one process leaves in torch's cache serves others: that write at the same time, and on another machine."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import torch, memo_compile
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

budget, folder, load, save = sys.argv[1:]
AOTAutogradCache._get_tmp_dir = classmethod(lambda _: folder)  # the C++ kernels of tests before stay
if load:
    torch.compiler.load_cache_artifacts(Path(load).read_bytes())

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))

torch.manual_seed(0)
model = torch.nn.Sequential(Block(), Block()).double()
x = torch.randn(256, 16, dtype=torch.float64)
options = {"memory_budget": budget, "host_budget": 2**24}
torch.compile(model, backend="memo", options=options)(x).pow(2).sum().backward()
got = [p.grad for p in model.parameters()]
model.zero_grad()
model(x).pow(2).sum().backward()
for gradient, parameter in zip(got, model.parameters(), strict=True):
    torch.testing.assert_close(gradient, parameter.grad)
if save:
    Path(save).write_bytes(torch.compiler.save_cache_artifacts()[0])
(plan,) = memo_compile.plans()
print(json.dumps({**counters["aot_autograd"], "peak": plan.predicted_peak, "seconds": plan.seconds}))
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that makes a step within a budget, with its entries in a folder of that name."""

    def started(budget, folder="cache", load="", save=""):
        files = (str(tmp_path / name) if name else "" for name in (folder, load, save))
        command = [sys.executable, "-c", PROGRAM, budget, *files]
        environment = {**os.environ, "MEMO_CACHE": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return started


def told(process):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1])


def test_processes_that_write_at_once_and_another_machine(start):
    beside = [start("min", save="artifacts"), start("0.9")]
    small, large = (told(process) for process in beside)
    assert small["autograd_cache_saved"] == large["autograd_cache_saved"] == 1
    assert small["peak"] < large["peak"]
    again, elsewhere = start("min"), start("min", folder="elsewhere", load="artifacts")
    for found in (told(again), told(elsewhere)):
        assert found["autograd_cache_hit"] == 1
        assert "autograd_cache_miss" not in found
        assert found["peak"] == small["peak"]
        assert found["seconds"] == 0.0
