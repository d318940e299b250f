"""What memo says: one summary a graph, what was measured, what to act on; and once in a distributed run."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo

import memo_compile
from memo_compile import logs
from memo_compile.schema import ActivationPlan, Binding, Cause, Plan, Stop

RANKS = 2
SCRIPT = """
import sys
import torch
from torch import distributed
from memo_compile.models import Llama, LlamaConfig

store, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
model = Llama(LlamaConfig(vocab=64, layers=2, width=32, heads=4, kv_heads=2, ffn=96))
x = torch.randint(0, 64, (1, 128))
fn = torch.compile(model, backend="memo_eager", options={"memory_budget": "min"})
for _ in range(2):
    fn(x, labels=x).backward()
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two ranks with logs and a trace: the stderr of each, and what tlparse makes of the first one's trace."""
    folder = tmp_path_factory.mktemp("trace")
    environment = {**os.environ, "TORCH_LOGS": "+memo_compile", "TORCH_TRACE": str(folder / "raw")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder / "store"), str(rank), str(RANKS)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, said
    (raw,) = (folder / "raw").glob("*rank_0_*.log")
    command = [os.path.join(os.path.dirname(sys.executable), "tlparse"), raw, "-o", folder / "pages", "--no-browser"]
    subprocess.run(command, check=True, capture_output=True)
    return said, folder / "pages"


def test_torch_logs_shows_summary_details_and_what_was_measured(trained):
    (said, _), _ = trained
    summaries = [line for line in said.splitlines() if "MiB planned of" in line]
    assert len(summaries) == 1
    for part in ("budget unlimited", "peak", "offloaded", "recomputed", "planned in"):
        assert part in summaries[0]
    measured = re.findall(r"peak .* MiB measured in the first step, ([+-][0-9.]+) %", said)
    assert len(measured) == 1
    assert abs(float(measured[0])) < 5
    assert re.search(r"MiB, of 128 rows \d+ kept, \d+ offloaded, \d+ recomputed; .*llama.py", said)


def test_the_second_rank_plans_the_same_and_says_nothing(trained):
    (first, second), _ = trained
    assert "memo_compile" in first
    assert "memo_compile" not in second


def test_tlparse_renders_plan_layers_arena_and_graphs(trained):
    _, pages = trained
    index = (pages / "index.html").read_text()
    for name in ("plan", "layers", "arena", "joint", "annotated", "forward", "backward"):
        links = re.findall(rf'href="([^"]*memo_{name}_[0-9]+\.(?:json|txt))"', index)
        assert links, name
        assert (pages / links[0]).stat().st_size > (20 if name == "arena" else 100)  # memo_eager has no buffers
    assert '"predicted_peak"' in next(pages.glob("*/memo_plan_*.json")).read_text()
    assert "llama.py" in next(pages.glob("*/memo_layers_*.txt")).read_text()


@pytest.fixture
def info(caplog):
    with caplog.at_level(logging.INFO, logger="memo_compile"):
        yield caplog


def train(options, x, repeats=1, forwards=1):
    model = zoo.make("llama")
    fn = torch.compile(model, backend="memo_eager", options=options)
    for _ in range(repeats):
        losses = [fn(x, labels=x) for _ in range(forwards)]
        torch.stack(losses).sum().backward()
    return fn


def test_the_first_step_is_measured_once(info):
    train({"memory_budget": "min"}, zoo.batch(1), repeats=2)
    (line,) = (r.getMessage() for r in info.records if "measured" in r.getMessage())
    measured = float(re.search(r"peak ([0-9.]+) MiB", line)[1]) * 2**20
    assert measured == pytest.approx(memo_compile.plans()[-1].predicted_peak, rel=0.1)


def test_two_forwards_before_a_backward_are_not_taken_for_a_step(info):
    train({"memory_budget": "min"}, zoo.batch(1), forwards=2)
    assert not [r for r in info.records if "measured" in r.getMessage()]


def test_a_running_profiler_is_left_alone(info):
    with torch.autograd.profiler.profile(use_cpu=True):
        train({}, zoo.batch(1))
    assert not [r for r in info.records if "measured" in r.getMessage()]


def test_nothing_is_measured_without_info(monkeypatch):
    monkeypatch.setattr("memo_compile.runtime.first_step.recorded", None)
    train({}, zoo.batch(1))


@pytest.mark.parametrize(("rank", "said"), [(0, True), (1, False)])
def test_only_the_first_rank_speaks(rank, said, info, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    for name in ("memo_compile", "memo_compile.planning.fit_budget", "memo_compile.runtime.host"):
        info.clear()
        logs.logger(name).warning("heard")
        assert bool(info.records) is said


def test_every_module_takes_its_logger_from_there():
    for path in Path(memo_compile.__file__).parent.rglob("*.py"):
        if path.name != "logs.py" and "cli" not in path.parts:
            assert "getLogger" not in path.read_text(), path


def plan_of(binding, cause):
    """A plan that offloads one activation of 1 MiB, with another of 1 MiB for which `cause` is given."""
    activations = [
        ActivationPlan(name, (1024, 256), "float32", 2**20, "model.py:1: y", 1024, *residency, cause)
        for name, residency, cause in (("a", (0, 1024, 0), Cause.SLICED), ("b", (1024, 0, 0), cause))
    ]
    numbers = {"predicted_peak": 1, "least_peak": 1, "unplanned_peak": 1, "predicted_seconds": 1.0, "host_bytes": 1}
    return Plan(
        **{"name": "graph_0", "backend": "memo", "budget": 1, **numbers, "forward_flops": 1, "recomputed_flops": 0},
        solver="highs",
        seconds=1.0,
        binding=binding,
        token_axis="",
        activations=tuple(activations),
        stops=(Stop("cumsum", "aten.cumsum.default", "model.py:2: z", "reads across the token axis"),),
    )


def test_host_memory_that_binds_is_said():
    assert not list(logs.advice(plan_of(Binding.DEVICE_MEMORY, Cause.SLICED)))
    (line,) = logs.advice(plan_of(Binding.HOST_MEMORY, Cause.SLICED))
    assert "raise host_budget" in line


def test_large_activations_that_cannot_be_sliced_are_said():
    (line,) = logs.advice(plan_of(Binding.DEVICE_MEMORY, Cause.NO_TOKEN_AXIS))
    assert "1.0 MiB of saved activations are kept whole" in line
    assert "aten.cumsum.default (model.py:2" in line
