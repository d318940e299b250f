"""Baselines: what goes into the file comes back, what counts as a regression, and who is blamed."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memo_compile.errors import InvalidBaseline, InvalidOption
from memo_compile.regression.baseline import METRICS, Baseline, Figures, SavedTensor, compare, load, save, tolerances
from memo_compile.regression.changes import as_json, github, in_words, text

DEFAULT = tolerances([])
TENSORS = (
    SavedTensor("mm", "model.py:1: y = w @ x", 1000, 400, 600, 0, 0),
    SavedTensor("gelu", "model.py:2", 500, 500, 0, 0, 0),
)
BEFORE = Figures(dict.fromkeys(METRICS, 100.0), TENSORS, {"unsliceable": ("known",)})


def now(notes=None, tensors=TENSORS, **metrics):
    return Figures({**BEFORE.metrics, **metrics}, tensors, BEFORE.notes if notes is None else notes)


def regressions(figures, allowed=DEFAULT):
    return {c.metric: c for c in compare("t", BEFORE, figures, allowed) if c.regression}


def test_a_baseline_reads_back_equal(tmp_path):
    baseline = Baseline("h100", "2.13.0", {"a:b": BEFORE, "c:d": now(peak=1)})
    save(baseline, tmp_path / "new" / "h100.json")
    assert load(tmp_path / "new" / "h100.json") == baseline


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"version": 0}), '{"version": 1, "targets": {"a": 1}}'])
def test_what_is_no_baseline_is_refused(content, tmp_path):
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(InvalidBaseline, match="--update"):
        load(path)
    with pytest.raises(InvalidBaseline, match="there is no baseline"):
        load(tmp_path / "none.json")


@given(st.sampled_from(sorted(METRICS)), st.floats(0.0, 3.0), st.floats(0.0, 1.0))
def test_a_regression_is_a_worsening_beyond_the_tolerance(metric, change, tolerance):
    figures = now(**{metric: 100 * change})
    found = regressions(figures, tolerances([f"{metric}={tolerance}"]))
    worse = (1 - change if METRICS[metric].higher_is_better else change - 1) > tolerance + 1e-9
    better = (1 - change if METRICS[metric].higher_is_better else change - 1) < tolerance - 1e-9
    assert not worse or set(found) == {metric}
    assert not better or not found


def test_anything_from_nothing_is_a_regression():
    before = replace(BEFORE, metrics={**BEFORE.metrics, "breaks": 0})
    (change,) = [c for c in compare("t", before, now(breaks=1), DEFAULT) if c.regression]
    assert "from 0" in in_words(change)


def test_tensors_that_hold_more_are_blamed_the_worst_first():
    tensors = (
        replace(TENSORS[0], kept=1000, offloaded=0),
        TENSORS[1],
        SavedTensor("new", "model.py:3", 900, 900, 0, 0, 0),
    )
    blame = regressions(now(peak=150, tensors=tensors))["peak"].blame
    assert blame[0].startswith("new, new: 900 bytes kept, 900 more than before; model.py:3")
    assert blame[1].startswith("mm: 1,000 bytes kept, 600 more")
    assert len(blame) == 2


def test_new_stops_are_blamed_for_what_cannot_be_sliced():
    tensors = (replace(TENSORS[0], whole=1000), TENSORS[1])
    figures = now({"unsliceable": ("known", "ends at aten.new")}, tensors, unsliceable=101)
    blame = regressions(figures)["unsliceable"].blame
    assert blame[0] == "ends at aten.new"
    assert "1,000 bytes cannot be sliced" in blame[1]


def test_a_tolerance_of_one_metric_or_of_all():
    assert tolerances(["peak=0.5"]) == {**DEFAULT, "peak": 0.5}
    assert set(tolerances(["0.25"]).values()) == {0.25}
    for wrong in ("pek=0.5", "peak=x", "-1", "peak=nan", ""):
        with pytest.raises(InvalidOption, match="--tolerance"):
            tolerances([wrong])


def test_the_table_shows_what_changed_and_what_is_behind_it():
    tensors = (replace(TENSORS[0], kept=1000, offloaded=0), TENSORS[1])
    changes = compare("models:llama", BEFORE, now(peak=200, host=50.0, planning=120, tensors=tensors), DEFAULT)
    shown = text(changes)
    assert "peak" in shown
    assert "+100.0%" in shown
    assert "REGRESSION" in shown
    assert "host memory" in shown
    assert "-50.0%" in shown
    assert "coverage" not in shown
    assert "planning" not in shown
    assert "mm: 1,000 bytes kept, 600 more than before; model.py:1: y = w @ x" in shown
    assert "not calibrated" not in shown
    assert "not calibrated" in text(compare("t", BEFORE, now(step=99.0), DEFAULT))
    assert "nothing changed" in text(compare("t", BEFORE, BEFORE, DEFAULT))


def test_annotations_are_escaped_as_github_asks():
    tensors = (replace(TENSORS[0], kept=1000), TENSORS[1])
    changes = compare("models:llama", BEFORE, now(peak=200, host=1, tensors=tensors), DEFAULT)
    (line,) = github(changes, {"models:llama": ("a,b.py", 7)})
    assert line.startswith("::error file=a%2Cb.py,line=7,title=memo check%3A models%3Allama::peak ")
    assert "%25" in line
    assert "%0Amm: 1,000 bytes kept" in line
    assert "\n" not in line


def test_json_holds_every_metric():
    rows = json.loads(as_json(compare("t", BEFORE, now(peak=200), DEFAULT)))
    assert {r["metric"]: r["change"] for r in rows}["peak"] == 1.0
    assert len(rows) == len(METRICS)
