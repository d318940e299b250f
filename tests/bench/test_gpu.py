"""The GPU benchmark's program, on a CPU and in small: it measures, goes on where it stopped, and refuses."""

import json
from dataclasses import asdict

import pytest
import torch

from bench import gpu, roster, worker

PEERS = ["eager", "checkpoint", "checkpoint+save_on_cpu", "inductor"]
TINY = ["--device", "cpu", "--tiny", "--in-process", "--peers", *PEERS]


def row_of(case, peak):
    made = {"card": "a card", "commit": "", "code": roster.code(case.model, case.peer), "torch": "2"}
    figures = {"tokens_per_second": 1.0, "mfu": 0.1, "reserved": 0, "allocated": 1, "host_bytes": 0}
    return {**asdict(case), **made, **figures, "peak": peak, "seconds": 1.0, "compile_seconds": 1.0, "losses": [1.0]}


def failed(case):
    return {**row_of(case, 0), "failed": "OutOfMemory", "said": "it does not fit"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    assert gpu.main([*TINY, "--out", str(out)]) == 0
    return out


def test_every_peer_trains_alike(results):
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == len(PEERS)
    by_peer = {r["peer"]: r for r in rows.values()}
    assert set(by_peer) == set(PEERS)
    for row in by_peer.values():
        assert "failed" not in row, row
        assert row["losses"] == pytest.approx(by_peer["eager"]["losses"], rel=1e-4)
        assert row["tokens_per_second"] > 0 < row["peak"]
    assert by_peer["eager"]["host_bytes"] == 0
    assert by_peer["inductor"]["compile_seconds"] > 0


def test_the_model_takes_less_than_its_step(results):
    for row in json.loads(results.read_text())["rows"].values():
        assert 0 < row["model_seconds"] < row["seconds"]


def test_lengths_and_steps_can_be_chosen(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(worker, "measure", lambda case: seen.append(case) or failed(case))
    chosen = ["--peers", "eager", "--tokens", "96", "160", "--steps", "1"]
    assert gpu.main([*TINY, *chosen, "--out", str(tmp_path / "gpu.json")]) == 0
    assert [(case.tokens, case.steps) for case in seen] == [(96, 1), (160, 1)]


def test_a_second_run_measures_nothing_again(results, monkeypatch):
    monkeypatch.setattr(worker, "measure", lambda case: pytest.fail("measured again"))
    assert gpu.main([*TINY, "--out", str(results)]) == 0


def test_a_run_that_is_out_of_time_says_so(tmp_path):
    assert gpu.main([*TINY, "--out", str(tmp_path / "gpu.json"), "--time-limit", "-1"]) == 3


def test_the_page_has_every_peer(results):
    table = results.with_suffix(".md").read_text()
    assert all(f"| {peer} |" in table for peer in PEERS)


def test_the_longest_length_is_found_by_bisection(tmp_path, monkeypatch):
    """A peer that holds 1 KiB a token on a device of 1 MiB trains 1 024 tokens, to an eighth."""

    def measure(case):
        peak = case.tokens * 1024
        return failed(case) if peak > case.limit else row_of(case, peak)

    monkeypatch.setattr(worker, "measure", measure)
    out = tmp_path / "gpu.json"
    arguments = ["--parts", "longest", "--device", "cpu", "--tiny", "--in-process", "--peers", "eager"]
    assert gpu.main([*arguments, "--limit", str(2**20), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"].values()
    assert max(r["tokens"] for r in rows if "failed" not in r) == 1024
    assert any("failed" in r for r in rows)


def test_an_unknown_peer_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--peers", "deepspeed"])
    assert "unknown peers deepspeed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_way_out_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err
