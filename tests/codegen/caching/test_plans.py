"""Plans are kept by themselves: what torch's cache does not take is compiled again, and not planned again."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch.compiler._cache import CacheArtifactManager

from memo_compile.cli import main
from memo_compile.codegen.caching import plans

PROGRAM = """
import json, sys, os
import torch, memo_compile
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from memo_compile.codegen.caching import plans
from memo_compile.codegen.rehearsal import Rehearsal
from memo_compile.planning import search
from pathlib import Path

folder, *cases = sys.argv[1:]
plans.plans_folder = lambda: Path(folder)  # the C++ kernels of tests before stay
AOTAutogradCache._lookup = AOTAutogradCache.save = staticmethod(lambda *a, **k: None)  # a bypass
asked = {}

def counted(owner, name, what):
    made = getattr(owner, name)
    def call(*args, **keywords):
        asked[what] += 1
        return made(*args, **keywords)
    setattr(owner, name, call)

counted(Rehearsal, "dry", "dry runs")
counted(search.rounding, "decide", "programs")
counted(search.rounding, "smallest_peak", "programs")

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))

def step(budget, of_a_range):
    asked.update({"programs": 0, "dry runs": 0})
    torch._dynamo.reset()
    memo_compile.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(), Block()).double()
    x = torch.randn(2, 256, 16, dtype=torch.float64)
    if of_a_range:
        torch._dynamo.mark_dynamic(x, 1)
    options = {"memory_budget": budget if budget == "min" else float(budget), "host_budget": 2**24}
    torch.compile(model, backend="memo", options=options)(x).pow(2).sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    (plan,) = memo_compile.plans()
    homes = [(a.name, a.kept, a.offloaded, a.recomputed) for a in plan.activations]
    return {**asked, "peak": plan.predicted_peak, "homes": homes, "range": str(plan.range)}

print(json.dumps({case: step(case.removesuffix("~"), case.endswith("~")) for case in cases}))
"""


def steps(folder, *cases):
    """What a process of its own asks and plans for steps, by budget, "~" for a range; gradients are those of eager."""
    command = [sys.executable, "-c", PROGRAM, str(folder), *cases]
    environment = {**os.environ, "MEMO_CACHE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def planned(told):
    return told["peak"], told["homes"], told["range"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with the plans of a process, and what this process told."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, steps(folder, "0.8", "0.8~")


@pytest.fixture
def kept(filled, tmp_path, monkeypatch):
    """A plan of that process, alone in a folder."""
    file = tmp_path / "plans" / next(iter(filled[0].iterdir())).name
    file.parent.mkdir()
    shutil.copy(filled[0] / file.name, file)
    monkeypatch.setattr(plans, "plans_folder", lambda: file.parent)
    return file


def test_another_process_neither_solves_nor_looks_and_another_budget_does(filled):
    folder, first = filled
    again = steps(folder, "0.8", "0.8~", "min")
    for case in first:
        assert first[case]["programs"] > 0
        assert again[case]["programs"] == 0
        assert planned(again[case]) == planned(first[case])
    assert first["0.8"]["dry runs"] > again["0.8"]["dry runs"] == 0
    assert first["0.8~"]["range"] != "None"
    assert again["0.8~"]["dry runs"] == 1  # in symbols
    assert again["min"]["programs"] > 0
    assert again["min"]["peak"] < again["0.8"]["peak"]


def torn(file):
    file.write_bytes(file.read_bytes()[:-100])


def changed(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(bytes(content))


def renamed(file):
    file.rename(file.with_name("f" * plans.DIGEST))


@pytest.mark.parametrize("spoil", [torn, changed, renamed])
def test_what_is_not_whole_is_left_out_and_told(spoil, kept, capsys):
    assert plans.find(kept.name).key == kept.name
    assert main(["cache", "check"]) == 0
    spoil(kept)
    (file,) = plans.kept_files()
    assert plans.find(file.name) is None
    assert main(["cache", "check"]) == 1
    assert str(file) in capsys.readouterr().out.replace("\n", "")


def test_a_plan_is_written_over_whole_and_cleared(kept):
    plan = plans.find(kept.name)
    torn(kept)
    plans.keep(plan)
    assert plans.find(kept.name) == plan
    assert [f.name for f in kept.parent.iterdir()] == [kept.name]
    assert main(["cache", "clear"]) == 0
    assert not list(plans.kept_files())


@pytest.mark.parametrize("spoil", [None, torn])
def test_torchs_artifacts_carry_plans_to_another_machine(spoil, kept, tmp_path, monkeypatch, capsys):
    """They are loaded by a process that need not know memo yet."""
    plan = plans.find(kept.name)
    with CacheArtifactManager.with_fresh_cache():
        plans.keep(plan)
        content, told = torch.compiler.save_cache_artifacts()
    assert told.aot_autograd_artifacts == [kept.name]
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(plans, "plans_folder", lambda: elsewhere / "plans")
    monkeypatch.setattr(AOTAutogradCache, "_get_tmp_dir", classmethod(lambda _: str(elsewhere / "torch")))
    assert torch.compiler.load_cache_artifacts(content).aot_autograd_artifacts == [kept.name]
    (loaded,) = (elsewhere / "torch" / kept.name).iterdir()
    if spoil is not None:
        spoil(loaded)
    assert main(["cache", "check"]) == (spoil is not None)
    assert ("1 plans" if spoil is None else str(loaded)) in capsys.readouterr().out.replace("\n", "")
    assert plans.find(kept.name) == (plan if spoil is None else None)
    assert not loaded.exists()
    assert (elsewhere / "plans" / kept.name).exists()


def test_a_plan_that_was_found_is_carried_on(kept):
    with CacheArtifactManager.with_fresh_cache():
        plans.find(kept.name)
        assert torch.compiler.save_cache_artifacts()[1].aot_autograd_artifacts == [kept.name]
