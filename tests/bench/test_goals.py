"""The goals' table: figures from rows, with their commits; what is not known is said to be so."""

import pytest

pytest.importorskip("bench.goals", reason="the benchmarks lie beside the package, not in it")

from bench import goals, rows
from bench.measurement import Case

K = 1024


@pytest.fixture
def stored(tmp_path):
    return rows.Rows(tmp_path / "gpu.json")


def add(stored, peer, tokens=64 * K, **figures):
    case = Case("llama-8b", 4, tokens, peer)
    start = {"model": case.model, "layers": case.layers, "tokens": tokens, "peer": peer, "card": "NVIDIA H200"}
    usual = {"tokens_per_second": 100.0, "mfu": 0.5, "peak": 2**30, "reserved": 103, "allocated": 100, "seconds": 1.0}
    stored.add({**start, "commit": "abc", "code": "old", "compile_seconds": 10.0, **usual, **figures})


def line(stored, figure):
    (found,) = [line for line in goals.table(stored).splitlines() if line.startswith(f"| {figure}")]
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_without_rows_nothing_is_known(stored):
    for found in goals.table(stored).splitlines()[2:]:
        assert found.count("not known") == 2


def test_rates_are_held_against_each_peer_that_moves_or_tiles(stored):
    for peer, rate in (("checkpoint+streams", 100.0), ("checkpoint+streams+tiles", 80.0), ("checkpoint", 10.0)):
        add(stored, peer, tokens_per_second=rate)
        add(stored, f"memo@{peer}", tokens_per_second=120.0)
    now, _, reached = line(stored, "tokens/s within")
    assert now == ("64K, checkpoint+streams: 1.20 × (H200, abc †); 64K, checkpoint+streams+tiles: 1.50 × (H200, abc †)")
    assert reached == "no, 1 of 2 short"


def test_a_longest_length_is_not_known_before_a_longer_one_failed(stored):
    add(stored, "memo-auto", 256 * K)
    add(stored, "checkpoint+streams", 128 * K)
    assert line(stored, "longest")[2] == "not known"
    add(stored, "checkpoint+streams", 256 * K, failed="OutOfMemoryError")
    now, _, reached = line(stored, "longest")
    assert now.startswith("run so far: 2.00 × (256K, and 128K by checkpoint+streams)")
    assert reached == "no"  # a million tokens did not run
    add(stored, "memo-auto", 1024 * K)
    assert line(stored, "longest")[2] == "as far as it is known"


def test_a_row_that_failed_and_one_of_a_test_are_no_figures(stored):
    add(stored, "memo-min", failed="BudgetTooSmall")
    assert line(stored, 'peak at "min"')[0] == "not known"
    add(stored, "memo-min", tiny=True)
    assert line(stored, 'peak at "min"')[0] == "not known"
    add(stored, "memo-min", peak=6 * 2**30)
    assert line(stored, 'peak at "min"') == ["64K: 6.0 GiB (H200, abc †)", "≤ 6.5 GiB", "as far as it is known"]


def test_what_is_predicted_reserved_and_covered_is_of_plans_that_do_something(stored):
    planned = {"predicted_seconds": 0.9, "model_seconds": 1.0, "coverage": 0.8, "recomputed_share": 0.0}
    add(stored, "memo-auto", **planned, planned_out=0)
    add(stored, "memo-min", **planned, planned_out=1)
    assert line(stored, "predicted")[0].count("-10.0%") == 2
    assert line(stored, "coverage")[0] == "64K, memo-min: 0.80 (H200, abc †)"
    assert line(stored, "reserved")[0] == "64K, memo-min: 1.03 (H200, abc †)"
