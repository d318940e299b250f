"""Each program in examples/ runs, small, and trains."""

import importlib.util
from pathlib import Path

import pytest
from ranks import Ranks

import memo_compile

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--backend", "memo_eager", "--layers", "2", "--width", "32", "--tokens", "256"]


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


def test_every_example_is_run_here():
    source = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in source for path in EXAMPLES.glob("*.py"))


def test_plain_loop():
    losses = run("plain_loop", *TINY, "--steps", "3", "--budget", "0.75")
    assert losses[-1] < losses[0]
    (plan,) = memo_compile.plans()
    assert plan.predicted_peak <= plan.budget < plan.unplanned_peak


def test_per_block_makes_one_plan_for_all_layers():
    """With Inductor: of one block it is soon done."""
    losses = run("per_block", *TINY, "--backend", "memo", "--steps", "2")
    assert losses[-1] < losses[0]
    (plan,) = memo_compile.plans()
    assert plan.backend == "memo"


def test_bfloat16_with_gradient_accumulation():
    losses = run("bfloat16_accumulation", *TINY, "--steps", "2", "--micro", "2")
    assert losses[-1] < losses[0] < 7
    assert any(a.dtype == "bfloat16" for a in memo_compile.plans()[0].activations)


def test_choosing_a_budget_makes_a_row_for_each(capsys):
    plans = run("choose_budget", "--layers", "1", "--width", "64", "--tokens", "512", "--budgets", "1.0", "0.01")
    assert [p.predicted_peak for p in plans] == sorted((p.predicted_peak for p in plans), reverse=True)
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows if "the least there is" in row] == ["0.01"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["hf_trainer", "trl_sft"])
def test_trainers_of_the_ecosystem(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loss = run(name, *TINY, "--steps", "2")
    assert 0 < loss < 10
    assert sum(p.offloaded_bytes + p.recomputed_bytes for p in memo_compile.plans()) > 0


def on_a_rank(rank, name, arguments):
    return run(name, *arguments)


def test_examples_for_several_devices(tmp_path):
    both = Ranks(tmp_path)
    for name in ("fsdp_blocks", "tensor_parallel", "sequence_parallel"):
        for losses in both.run(on_a_rank, name, [*TINY, "--steps", "3"]):
            assert losses[-1] < losses[0]
    for loss in both.run(on_a_rank, "hf_trainer", [*TINY, "--steps", "2"]):
        assert 0 < loss < 10
    both.stop()
