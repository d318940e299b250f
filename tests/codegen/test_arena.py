"""The arena of a compiled model: what is emitted, and what it holds."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import zoo

import memo_compile
from memo_compile.codegen.arena import plan_arena
from memo_compile.codegen.emitted import Body, Storage

SCRIPT = """
import sys, torch, zoo, memo_compile
model, x = zoo.one_layer_llama(), zoo.batch(1)
_, expected = zoo.gradients(model, model, x)
budget = None if sys.argv[1] == "none" else sys.argv[1]
options = {"memory_budget": budget} if budget else {}
_, got = zoo.gradients(model, torch.compile(model, backend="memo", options=options), x)
zoo.assert_close(got, expected)
print(memo_compile.plans()[-1].predicted_peak)
"""


def test_two_budgets_against_one_warm_cache(tmp_path):
    """Inductor's caches know nothing of plans: a hit would bring the other plan's offsets."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.path.dirname(zoo.__file__)}
    peaks = []
    for budget in ("none", "min"):
        command = [sys.executable, "-c", SCRIPT, budget]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[0] > peaks[1]


@pytest.mark.parametrize("budget", ["auto", "min"])
def test_what_is_planned_is_what_is_measured(budget, tmp_path):
    model, x = zoo.make("llama"), zoo.batch(3)
    fn = torch.compile(model, backend="memo", options={"memory_budget": budget, "dump": str(tmp_path)})
    fn(x, labels=x).backward()
    model.zero_grad(set_to_none=True)
    measured = memo_compile.measure_peak(lambda: fn(x, labels=x).backward())
    plan = memo_compile.plans()[-1]
    assert measured == pytest.approx(plan.predicted_peak, rel=0.001)
    assert plan.arena_bytes <= 1.01 * plan.lower_bound
    assert plan.coverage >= 0.85
    code = (tmp_path / plan.name / "forward_code.py").read_text()
    assert re.search(r"alloc_from_pool\(memo_arena_\d+, \d+, torch\.float64", code)
    assert re.search(r"extern_kernels\.mm\(.*out=", code)
    layers = json.loads((tmp_path / plan.name / "emitted.json").read_text())["layer_of"]
    assert {0, 1, 2, 3} <= set(layers.values())


def test_nothing_to_do_adds_no_nodes(tmp_path):
    model, x = zoo.make("llama"), zoo.batch(1)
    torch.compile(model, backend="memo", options={"dump": str(tmp_path)})(x, labels=x).backward()
    (folder,) = tmp_path.iterdir()
    for name in ("forward.py", "backward.py"):
        assert "torch.ops.memo" not in (folder / name).read_text()
    assert memo_compile.plans()[-1].offloaded_bytes == memo_compile.plans()[-1].recomputed_bytes == 0


@pytest.mark.parametrize("name", ["hf-gpt2", "hf-gpt2-dropout"])
def test_what_autograd_and_kernels_hold_is_counted_to_the_byte(name):
    """A tangent of the size of the logits, a kernel with one result, kernels with several."""
    model, x = zoo.make(name), zoo.batch(1)
    fn = torch.compile(model, backend="memo")
    fn(x, labels=x).loss.backward()
    model.zero_grad(set_to_none=True)

    def step():
        output = fn(x, labels=x)
        output.loss.backward()

    assert memo_compile.measure_peak(step) == memo_compile.plans()[-1].predicted_peak


def test_without_a_budget_the_peak_is_no_higher_than_inductors():
    model, x = zoo.make("gpt"), zoo.batch(3)
    peaks = {}
    for backend in ("inductor", "memo"):
        torch._dynamo.reset()
        fn = torch.compile(model, backend=backend)
        fn(x, labels=x).backward()
        model.zero_grad(set_to_none=True)
        peaks[backend] = memo_compile.measure_peak(lambda fn=fn: fn(x, labels=x).backward())
        model.zero_grad(set_to_none=True)
    assert peaks["memo"] <= peaks["inductor"]


def test_layers_that_repeat_are_placed_once():
    # (KiB, start, life) of a layer's transients; the longest first order that greedy would take differs by layer.
    shape = [(8, 0, 3), (4, 1, 4), (6, 3, 4), (2, 2, 2)]
    storages, layer_of = {}, {}
    for k in range(4):
        for i, (size, start, life) in enumerate(shape):
            name = f"buf{k}_{i}"
            storages[name] = Storage(name, "allocated", size << 10, 7 * k + start, 7 * k + start + life)
            layer_of[f"fw:{name}"] = 2 * k
    forward, backward = Body(28, storages, (), ()), Body(1, {}, (), ())
    layout = plan_arena(forward, backward, [], 0, layer_of=layer_of)
    places = {b.name: b.offset for b in layout.buffers}
    assert len(layout.segments) == 1
    assert layout.arena_bytes == layout.lower_bound
    for i in range(len(shape)):
        assert len({places[f"fw:buf{k}_{i}"] for k in range(4)}) == 1
