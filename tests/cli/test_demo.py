"""The demo, small."""

import json

import pytest

from memo_compile.cli import demo, main
from memo_compile.errors import TransferFailed

SMALL = ["demo", "--steps", "1", "--layers", "1", "--width", "32", "--tokens", "64"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def cells(shown, label):
    """The numbers of one row of the table; None where a run has none."""
    (line,) = (line for line in shown.splitlines() if line.startswith(f"│ {label}"))
    return [float(c.strip(" %")) if c.strip() else None for c in line.strip("│").split("│")[1:]]


def test_the_demo_trains_three_ways_and_leaves_its_dumps(tmp_path, capsys):
    (tmp_path / "graph_of_an_earlier_run").mkdir()
    (tmp_path / "graph_of_an_earlier_run" / "plan.json").touch()
    arguments = ["--steps", "3", "--layers", "2", "--width", "32", "--tokens", "256", "--budgets", "0.95", "min"]
    assert main(["demo", *arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for label in ("offloaded", "forward FLOPs recomputed", "arena / lower bound", "coverage", "compile, s", "step, ms"):
        assert None not in cells(shown, label)[2:]
    assert max(cells(shown, "largest difference from inductor")) < 1e-4
    measured, planned = cells(shown, "peak measured, MiB"), cells(shown, "peak planned, MiB")
    assert measured[2] <= cells(shown, "budget, MiB")[2] < measured[1]
    assert measured[2:] == pytest.approx(planned[2:], rel=0.05)
    dumps = [p.parent for p in tmp_path.glob("*/plan.json") if p.stat().st_size]
    assert {json.loads((d / "plan.json").read_text())["name"] for d in dumps} == {d.name for d in dumps}
    assert len(dumps) == 2
    last = shown.splitlines()[-1]
    assert all(str(d) in last for d in dumps)
    assert "earlier" not in last


def test_a_budget_that_cannot_be_kept_is_told_beside_what_was_trained(tmp_path, capsys, monkeypatch):
    def train(name, arguments, data, progress, wrap):
        """Without Inductor, which takes its time."""
        return real(name, arguments, data, progress, wrap if name.startswith("memo") else lambda model: model)

    real = demo._train
    monkeypatch.setattr(demo, "_train", train)
    assert main([*SMALL, "--budgets", "1KiB", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert len(cells(shown.out, "last loss")) == 2
    assert "--budgets 1KiB: memory_budget = 1,024 bytes cannot be kept" in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--budgets", budget] for budget in ("1.5", "0", "nan", "some", "-1")),
        *(["--width", width] for width in ("0", "12", "24")),
        ["--steps", "0"],
        ["--tokens", "1"],
        ["--out", "/dev/null"],
        ["--out", "/proc/nowhere"],
    ],
    ids=" ".join,
)
def test_mistakes_end_in_a_message_before_anything_is_trained(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_train", lambda *_: pytest.fail("something is trained"))
    assert main([*SMALL, "--out", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert arguments[0] in line
    assert "Allowed" in line


def test_an_error_that_dynamo_wraps_ends_in_its_message(tmp_path, capsys, monkeypatch):
    class Wrapped(Exception):
        inner_exception = TransferFailed("no room")

    def failing(*_):
        raise Wrapped

    monkeypatch.setattr(demo, "_train", failing)
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "memo demo: no room\n"
