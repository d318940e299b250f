"""The demo, small."""

import json

import pytest

from memo_compile.cli import main


def test_the_demo_trains_three_ways_and_leaves_its_dumps(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["--steps", "3", "--layers", "2", "--width", "32", "--tokens", "256", "--budgets", "0.95", "min"]
    assert main(["demo", *arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for row in ("last loss", "peak measured", "peak planned", "offloaded", "coverage", "step, ms"):
        assert row in shown
    assert len([json.loads(p.read_text()) for p in tmp_path.glob("*/plan.json")]) == 2


@pytest.mark.parametrize("arguments", [["--budgets", "1.5"], ["--budgets", "some"], ["--steps", "0"]])
def test_mistakes_end_in_a_message(arguments, tmp_path, capsys):
    assert main(["demo", "--steps", "1", "--layers", "1", "--width", "32", *arguments, "--out", str(tmp_path)]) == 2
    assert "Allowed" in capsys.readouterr().err
