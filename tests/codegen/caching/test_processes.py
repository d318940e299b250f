"""What one process leaves in torch's cache serves others: that write at the same time, and on another machine."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, logging, sys
from pathlib import Path
import torch, memo_compile
from memo_compile.codegen.caching import plans
from memo_compile.codegen.rehearsal import Rehearsal
from memo_compile.planning import rounding
from memo_compile.runtime.tiles import compiled_bodies
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._inductor.cpp_builder import CppBuilder

budget, tiles, folder, load, save = sys.argv[1:]
AOTAutogradCache._get_tmp_dir = classmethod(lambda _: folder)  # the C++ kernels of tests before stay
plans.plans_folder = lambda: Path(f"{folder}-plans")
asked, told = [], []

def counted(owner, name):
    made = getattr(owner, name)
    def call(*args, **keywords):
        if not (owner is CppBuilder and args[0]._name.endswith("header")):  # which each process reads for its hash
            asked.append(name)
        return made(*args, **keywords)
    setattr(owner, name, call)

for owner, name in ((Rehearsal, "dry"), (rounding, "decide"), (rounding, "smallest_peak"), (CppBuilder, "build")):
    counted(owner, name)
listener = logging.Handler()
listener.emit = lambda record: told.append(record.getMessage())
logging.getLogger("memo_compile").addHandler(listener)
logging.getLogger("memo_compile").setLevel(logging.INFO)
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
options = {"memory_budget": budget, "host_budget": 2**24, "tiles": int(tiles)}
torch.compile(model, backend="memo", options=options)(x).pow(2).sum().backward()
got = [p.grad for p in model.parameters()]
model.zero_grad()
model(x).pow(2).sum().backward()
work = list(asked)
for gradient, parameter in zip(got, model.parameters(), strict=True):
    torch.testing.assert_close(gradient, parameter.grad)
if save:
    Path(save).write_bytes(torch.compiler.save_cache_artifacts()[0])
(plan,) = memo_compile.plans()
facts = {"peak": plan.predicted_peak, "seconds": plan.seconds, "bodies": sorted(compiled_bodies())}
print(json.dumps({**counters["aot_autograd"], **facts, "work": sorted(set(work)), "told": told}))
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that makes a step within a budget in tiles, with its entries in a folder of that name."""

    def started(budget, tiles, folder="cache", load="", save=""):
        files = (str(tmp_path / name) if name else "" for name in (folder, load, save))
        command = [sys.executable, "-c", PROGRAM, budget, str(tiles), *files]
        environment = {**os.environ, "MEMO_CACHE": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return started


def told(process):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1])


def test_processes_that_write_at_once_and_another_machine(start):
    beside = [start("min", 4, save="artifacts"), start("0.9", 1)]
    small, large = (told(process) for process in beside)
    assert small["autograd_cache_saved"] == large["autograd_cache_saved"] == 1
    assert small["peak"] < large["peak"]
    assert {"dry", "smallest_peak"} <= set(small["work"])
    assert small["bodies"]
    assert not large["bodies"]
    again, elsewhere = start("min", 4), start("min", 4, folder="elsewhere", load="artifacts")
    for found in (told(again), told(elsewhere)):
        assert found["autograd_cache_hit"] == 1
        assert "autograd_cache_miss" not in found
        assert found["peak"] == small["peak"]
        assert found["seconds"] == 0.0
        assert found["bodies"] == small["bodies"]
        assert not found["work"]
        assert any("(memo): budget" in line for line in found["told"])
        assert any("measured in the first step" in line for line in found["told"])
