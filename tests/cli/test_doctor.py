"""`memo doctor`: what is here, what would stop a plan, and a measured profile."""

from itertools import pairwise

import pytest
import torch

from memo_compile.cli import doctor, main
from memo_compile.hardware import calibration as measuring
from memo_compile.hardware.profiles import load, machine_name, resolve, stored_profile


def test_it_says_what_is_here(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "highspy", "C++ compiler", "host memory", "lockable memory", "Profile for costs: cpu"):
        assert part in text


def test_no_compiler_stops_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "install g++" in " ".join(capsys.readouterr().out.split())


def test_an_unsupported_torch_stops_it(monkeypatch):
    monkeypatch.setattr("memo_compile.versions.NEWEST", (2, 10))
    assert [f.what for f in doctor.examine("cpu") if f.stops] == ["torch is supported"]


def test_little_memory_and_no_locking_are_told(monkeypatch):
    monkeypatch.setattr(doctor, "free_host_memory", lambda: 2**20)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (8 * 2**20, 8 * 2**20))
    assert "little room" in doctor._host_memory().advice
    assert "ulimit" in doctor._locked_memory("cuda").advice
    assert not doctor._locked_memory("cpu").advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert main(["doctor", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_measured_profile_is_stored_and_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEMO_PROFILES", str(tmp_path))
    for name, small in (("COPY", 2**20), ("WIDTHS", (32, 64, 128)), ("TOKENS", (32, 64)), ("ROWS", (16, 64))):
        monkeypatch.setitem(getattr(measuring, name), "cpu", small)
    assert main(["doctor", "--measure", "--device", "cpu"]) == 0
    found = load(stored_profile("cpu"))
    assert found.name == machine_name("cpu")
    assert resolve("auto", "cpu") == found
    assert min(found.d2h, found.h2d, found.memory_bandwidth, found.peak_flops["float32"]) > 1e6
    assert 0 < found.both_ways <= 1
    assert found.matmul_efficiency[-1][1] <= 1
    assert [rows for rows, _ in found.matmuls_by_rows] == [16, 64, 128]
    assert found.matmuls_by_rows[-1][1] == found.matmul_efficiency
    assert [heads for heads, _ in found.attention_by_heads] == [1, measuring.HEADS]
    assert all(size < more for _, table in found.attention_by_heads for (size, _), (more, _) in pairwise(table))
    assert "measured by memo doctor" in " ".join(capsys.readouterr().out.split())
