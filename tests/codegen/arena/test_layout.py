"""The arena of a compiled model: what is emitted, and what it holds."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx

import memo_compile
from memo_compile.codegen.arena.layout import plan_arena
from memo_compile.codegen.arena.sides import key_of
from memo_compile.codegen.emitted.body import Body, Storage
from memo_compile.schema import Plan, Side

SCRIPT = """
import sys, torch, zoo, memo_compile
model, x = zoo.one_layer_llama(), zoo.batch(3)
_, expected = zoo.gradients(model, model, x)
budget = sys.argv[1] if sys.argv[1] == "min" else float(sys.argv[1])
_, got = zoo.gradients(model, torch.compile(model, backend="memo", options={"memory_budget": budget}), x)
zoo.assert_close(got, expected)
print(memo_compile.plans()[-1].predicted_peak, memo_compile.plans()[-1].unplanned_peak)
"""


@pytest.mark.grid
def test_two_budgets_against_one_warm_cache(tmp_path):
    """Inductor's caches know nothing of plans: a hit would bring the other plan's offsets."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.path.dirname(zoo.__file__)}
    peaks = []
    for budget in ("0.9", "min"):
        command = [sys.executable, "-c", SCRIPT, budget]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        peak, unplanned = map(int, done.stdout.split())
        peaks.append(peak)
    assert unplanned > peaks[0] > peaks[1]


@dataclass(frozen=True)
class Trained:
    """A compiled step: its plan, the bytes that it held, and its dump."""

    plan: Plan
    measured: int
    folder: Path

    def body(self, graph):
        """The statements that the emitted forward or backward runs, and the results that it returns."""
        code = (self.folder / f"{graph}_code.py").read_text()
        body, rest = code.split("def call(", 1)[1].split("return (", 1)
        lines = [line.strip() for line in body.splitlines() if not line.lstrip().startswith("#")]
        return lines, rest.splitlines()[0]


@pytest.fixture(scope="module", params=["auto", "min"])
def trained(request, tmp_path_factory):
    torch._dynamo.reset()
    root = tmp_path_factory.mktemp("arena")
    model, x = zoo.make("llama"), zoo.batch(3)
    fn = torch.compile(model, backend="memo", options={"memory_budget": request.param, "dump": str(root)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMO_PROFILES", str(root / "none"))
        fn(x, labels=x).backward()
    model.zero_grad(set_to_none=True)
    measured = memo_compile.measure_peak(lambda: fn(x, labels=x).backward())
    plan = memo_compile.plans()[-1]
    return Trained(plan, measured, root / plan.name)


def test_what_is_planned_is_what_is_measured(trained):
    assert trained.measured == pytest.approx(trained.plan.predicted_peak, rel=0.001)


def test_the_arena_is_packed_and_holds_nearly_all_that_is_live(trained):
    assert trained.plan.arena_bytes <= 1.01 * trained.plan.lower_bound
    assert trained.plan.coverage >= 0.85
    layers = json.loads((trained.folder / "emitted.json").read_text())["layer_of"]
    assert {0, 1, 2, 3} <= set(layers.values())


def test_matmuls_are_written_into_the_arena_and_gradients_outside(trained):
    weights = 7 * zoo.SMALL["layers"] + 1
    for graph, results in (("forward", 0), ("backward", weights)):
        lines, returned = trained.body(graph)
        views = map(re.compile(r"(\w+) = (?:alloc_from_pool|reinterpret_tensor)\(memo_arena_\d+, ").match, lines)
        placed = {m[1] for m in views if m}
        written = re.findall(r"extern_kernels\.mm\(.*out=(\w+)\)", "\n".join(lines))
        outside = {name for name in written if name not in placed}
        assert len(written) > len(outside) == results
        assert outside <= set(re.findall(r"\w+", returned))


# Beside these a lease is taken, named anew, checked, and dropped.
COPIES = r"(?:\w+ = )?memo_(offload|offload_wait|prefetch|wait|prefetch_buffer)\("
HANDLED = rf"({COPIES}|\w+ = (torch\.ops\.memo\.host_lease\.default\(|\w+$)|del |assert_|.* = args$)"


def test_emitted_code_touches_the_host_lease_only_through_memos_copies(trained):
    for graph, copies in (("forward", {"offload", "offload_wait"}), ("backward", {"prefetch", "wait"})):
        lines, _ = trained.body(graph)
        leases = {"memo_host_lease"}
        for line in lines:
            made = re.match(r"(\w+) = (torch\.ops\.memo\.host_lease|(\w+)$)", line)
            if made and (made[3] is None or made[3] in leases):
                leases.add(made[1])
        touching = [line for line in lines if leases & set(re.findall(r"\w+", line))]
        assert [line for line in touching if not re.match(HANDLED, line)] == []
        found = {m[1] for m in map(re.compile(COPIES).match, touching) if m}
        assert found - {"prefetch_buffer"} == (copies if trained.plan.offloaded_bytes else set())


def kinds(graph):
    """How many nodes of each kind; what Inductor has lowered already has reshapes in place of its views."""
    names = (str(n.target) if n.op == "call_function" else n.op for n in graph.nodes)
    return Counter(name.replace("aten.reshape.", "aten.view.") for name in names)


def inductors_graphs(model, x):
    """What Inductor would compile, left to itself."""
    found = []

    def inner(gm, inputs, **_):
        found.append(kinds(gm.graph))
        return make_boxed_func(gm.forward)

    fn = torch.compile(model, backend=lambda gm, inputs: compile_fx.compile_fx(gm, inputs, inner_compile=inner))
    fn(x, labels=x).backward()
    return found


def test_nothing_to_do_adds_no_nodes(monkeypatch):
    model, x = zoo.one_layer_llama(), zoo.batch(1)
    expected = inductors_graphs(model, x)
    found, compile_inner = [], compile_fx.compile_fx_inner

    def inner(gm, inputs, **kwargs):
        found.append(kinds(gm.graph))
        return compile_inner(gm, inputs, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", inner)
    torch._dynamo.reset()
    torch.compile(model, backend="memo")(x, labels=x).backward()
    assert len(expected) == 2
    assert found[-2:] == expected  # after those of the dry runs
    assert memo_compile.plans()[-1].offloaded_bytes == memo_compile.plans()[-1].recomputed_bytes == 0


@pytest.mark.parametrize("name", [pytest.param("hf-gpt2", marks=pytest.mark.grid), "hf-gpt2-dropout"])
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
    model, x = zoo.one_layer_gpt(), zoo.batch(3)
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
            layer_of[key_of(Side.FORWARD, name)] = 2 * k
    forward, backward = Body(28, storages, (), ()), Body(1, {}, (), ())
    layout = plan_arena(forward, backward, [], 0, layer_of=layer_of)
    places = {b.name: b.offset for b in layout.buffers}
    assert len(layout.segments) == 1
    assert layout.arena_bytes == layout.lower_bound
    for i in range(len(shape)):
        assert len({places[f"buf{k}_{i}"] for k in range(4)}) == 1
