"""`memo plan`: a table a person can read, JSON, and one message for each mistake."""

import json

import pytest

from memo_compile.cli import main
from memo_compile.forecast.forecast import Asked, forecast_preset
from memo_compile.forecast.parallel import layout
from memo_compile.passes.analysis.costs import KernelTimer

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
        "arena / lower bound",
        "layers 0 to 31",
    ):
        assert part in text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["layers"] == 32
    assert found["peak"] <= found["budget"]
    assert 0 < found["arena"]["bytes"] <= 1.001 * found["arena"]["lower_bound"]
    assert found["offloaded"] <= found["host_budget"] == 2 * 2**40 // 8
    assert found["kept"] + found["offloaded"] + found["recomputed"] == pytest.approx(found["saved"], rel=1e-6)
    # By hand: a step's FLOPs for one of 8 ranks, without the head's (0.7 %), at the predicted time and peak rate.
    width, tokens = 4096, 1 << 20
    flops = 32 * (3 * 24 * tokens * width**2 + 7 * tokens**2 * width) / 8
    assert found["mfu"] == pytest.approx(flops / found["step_seconds"] / 312e12, rel=0.01)
    assert found["tokens_per_second"] == pytest.approx(tokens / found["step_seconds"])


def test_a_budget_below_whole_logits_takes_tiles():
    roomy, tight = (
        forecast_preset(Asked("llama-1b", 1 << 14, layout(8, 1, 3), "h100", 2 << 40, budget << 30))
        for budget in (60, 5)
    )
    assert roomy.tiles == 1
    assert roomy.peak > 5 << 30
    assert tight.tiles > 1
    assert tight.fits
    assert tight.peak <= 5 << 30
    assert tight.flops == roomy.flops


@pytest.mark.grid
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
        (["--preset", "gpt-7b", "--seq", "1024", "--gpus", "8", "--cp", "3"], "--cp"),
        (["--preset", "gpt-7b", "--seq", "1024", "--gpus", "8", "--tp", "2", "--cp", "2"], "--cp"),
        (["--preset", "gpt-7b", "--seq", "1024", "--zero", "4"], "--zero"),
        (["--preset", "gpt-7b", "--seq", "1024", "--hardware", "h900"], "h900"),
        (["--preset", "gpt-7b", "--seq", "1024", "--host-memory", "much"], "--host-memory"),
        (["--preset", "gpt-7b", "--seq", "1024", "--memory-budget", "0"], "--memory-budget"),
        (["--preset", "gpt-7b", "--seq", "1024", "--strategy", "pray"], "--strategy"),
        (["--preset", "gpt-7b", "--seq", "1024", "--trace-layers", "3"], "--trace-layers"),
        (["--preset", "gpt-7b", "--seq", "1024", "--json", "/tmp"], "--json"),
        (["no_such_module:function"], "no_such_module"),
        (["json"], "package.module:function"),
        (["json:loads"], "it raised TypeError"),
        (["math:pi"], "it is a float"),
        (["--preset", "gpt-7b", "--seq", "1024", "--json", "/no/such/folder/plan.json"], "--json"),
    ],
)
def test_a_mistake_is_one_message(arguments, named, capsys):
    assert main(["plan", *arguments]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message


KERNELS = """
import torch

def block():
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
    return model, (torch.zeros(512, 256),)
"""


def test_kernels_are_measured_where_the_hardware_is_here(tmp_path, monkeypatch):
    (tmp_path / "measured_kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(KernelTimer, "_time", lambda timer, node: 7.0)
    command = ["plan", "measured_kernels:block", "--hardware", "cpu", "--json", "plan.json"]
    assert main([*command, "--measure-kernels"]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["step_seconds"] == pytest.approx(5 * 7.0, rel=0.01)  # two matmuls forward, three backward
    assert sum(found["seconds_by_op"].values()) == pytest.approx(found["step_seconds"], rel=0.01)


def test_kernels_are_really_run(tmp_path, monkeypatch):
    (tmp_path / "measured_block.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "measured_block:block", "--hardware", "cpu", "--json", "reckoned.json"]) == 0
    assert (
        main(["plan", "measured_block:block", "--hardware", "cpu", "--json", "measured.json", "--measure-kernels"]) == 0
    )
    reckoned, measured = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("reckoned", "measured"))
    assert 0 < measured["step_seconds"] != reckoned["step_seconds"]


def test_kernels_of_hardware_that_is_not_here_are_not_measured(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*GPT, "--measure-kernels"]) == 2
    assert "--measure-kernels" in capsys.readouterr().err


def test_a_model_that_does_not_fit_says_so_with_numbers(capsys):
    assert main(["plan", "--preset", "gpt-65b", "--seq", "65536", "--hardware", "a800"]) == 2
    message = capsys.readouterr().err
    assert "optimizer" in message
    assert "--zero" in message


HF_LLAMA = """
import torch, transformers

def make():
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    tokens = 131072
    config = transformers.LlamaConfig(
        vocab_size=128256, num_hidden_layers=2, max_position_embeddings=tokens, use_cache=False,
        bos_token_id=0, eos_token_id=0, **sizes,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    model.loss_type = "ForCausalLM"
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return model, (ids,), {"labels": ids, "attention_mask": torch.ones_like(ids)}
"""


def test_a_mask_of_hugging_faces_llama_jumps_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "hf_long.py").write_text(HF_LLAMA)
    monkeypatch.chdir(tmp_path)
    main(["plan", "hf_long:make", "--hardware", "h200", "--json", "plan.json"])
    found = json.loads((tmp_path / "plan.json").read_text())
    mask = next(t for t in found["largest"] if t["quadratic"])
    assert mask["shape"][-2:] == [131072, 131072]
    assert "transformers/" in mask["source"]
    text = " ".join(capsys.readouterr().out.split())
    assert "(1, 1, 131072, 131072)" in text
    assert "grow with the square of the tokens" in text
    assert "leave out attention_mask" in text


@pytest.mark.parametrize("command", ["plan", "place", "check", "demo", "doctor", "report", "replay"])
def test_help_is_text(command, capsys):
    """argparse takes a lone % for a format."""
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "option_strings" not in capsys.readouterr().out
