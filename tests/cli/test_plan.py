"""`memo plan`: a table a person can read, JSON, and one message for each mistake."""

import json

import pytest

from memo_compile.cli import main
from memo_compile.forecast import Asked, forecast_preset
from memo_compile.parallel import layout

GPT = ["plan", "--preset", "gpt-7b", "--seq", "1048576", "--gpus", "8", "--tp", "8", "--hardware", "a800"]


def test_a_preset_is_planned(tmp_path, capsys):
    assert main([*GPT, "--host-memory", "2TiB", "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    for part in (
        "gpt-7b, 1,048,576 tokens",
        "parameters",
        "optimizer",
        "MFU",
        "tokens/s",
        "what binds",
        "layers 0 to 31",
    ):
        assert part in text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["layers"] == 32
    assert found["peak"] <= found["budget"]
    assert found["offloaded"] <= found["host_budget"] == 2 * 2**40 // 8
    assert found["kept"] + found["offloaded"] + found["recomputed"] == pytest.approx(found["saved"], rel=1e-6)
    # By hand: a step's FLOPs for one of 8 ranks, without the head's (0.7 %), at the predicted time and peak rate.
    width, tokens = 4096, 1 << 20
    flops = 32 * (3 * 24 * tokens * width**2 + 7 * tokens**2 * width) / 8
    assert found["mfu"] == pytest.approx(flops / found["step_seconds"] / 312e12, rel=0.01)
    assert found["tokens_per_second"] == pytest.approx(tokens / found["step_seconds"])


def test_a_tighter_budget_is_no_faster():
    at = [
        forecast_preset(Asked("gpt-7b", 1 << 20, layout(8, 8, 1), "a800", 2 << 40, budget << 30)) for budget in (60, 45)
    ]
    assert at[0].step_seconds <= at[1].step_seconds
    assert at[1].peak <= 45 << 30


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preset", "gpt-9b", "--seq", "1024"], "gpt-9b"),
        (["--preset", "gpt-7b"], "--seq"),
        (["--preset", "gpt-7b", "--seq", "1023", "--gpus", "8", "--tp", "8"], "'seq' = 1023"),
        (["--preset", "gpt-7b", "--seq", "1024", "--gpus", "6", "--tp", "4"], "--tp"),
        (["--preset", "gpt-7b", "--seq", "1024", "--gpus", "0"], "--gpus"),
        (["--preset", "gpt-7b", "--seq", "1024", "--zero", "4"], "--zero"),
        (["--preset", "gpt-7b", "--seq", "1024", "--hardware", "h900"], "h900"),
        (["--preset", "gpt-7b", "--seq", "1024", "--host-memory", "much"], "--host-memory"),
        (["--preset", "gpt-7b", "--seq", "1024", "--memory-budget", "0"], "--memory-budget"),
        (["--preset", "gpt-7b", "--seq", "1024", "--strategy", "pray"], "--strategy"),
        (["--preset", "gpt-7b", "--seq", "1024", "--json", "/no/such/folder/plan.json"], "--json"),
    ],
)
def test_a_mistake_is_one_message(arguments, named, capsys):
    assert main(["plan", *arguments]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message


def test_a_model_that_does_not_fit_says_so_with_numbers(capsys):
    assert main(["plan", "--preset", "gpt-65b", "--seq", "65536", "--hardware", "a800"]) == 2
    assert "optimizer" in capsys.readouterr().err
