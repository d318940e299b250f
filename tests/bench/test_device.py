"""The agenda for a GPU, on a CPU and in small: it stores, goes on, keeps to its time, and tells old rows from new."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("bench.device", reason="the benchmarks lie beside the package, not in it")

from bench import agenda, device, pages, provenance, roster, rows, worker
from bench.agenda import Item
from bench.measurement import Case

TINY = ["--tiny", "--in-process", "--parts", "rows", "--minutes", "5"]
CASE = Case("llama-8b", 4, 65536, "checkpoint", steps=2)


def row_of(case, card="NVIDIA H200", **more):
    figures = {
        "tokens_per_second": 100.0,
        "mfu": 0.5,
        "peak": 2**30,
        "reserved": 2**31,
        "allocated": 2**31,
        "host_bytes": 0,
        "compile_seconds": 1.0,
        "first_step_seconds": 2.0,
        "seconds": 1.0,
        "losses": [1.0],
    }
    start = {"model": case.model, "layers": case.layers, "tokens": case.tokens, "peer": case.peer}
    made = {"card": card, "commit": "abc", "code": roster.code(case.model, case.peer), "torch": "2"}
    return {**start, **made, **figures, **more}


@pytest.fixture
def stored(tmp_path):
    return rows.Rows(tmp_path / "gpu.json")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a run of two peers, with memo within the first one's peak."""
    out = tmp_path_factory.mktemp("device")
    only = ["--only", *(f"llama-8b/1/128/{p}" for p in ("checkpoint", "memo@checkpoint", agenda.TILES))]
    assert device.main([*TINY, *only, "--out", str(out)]) == 0
    return out, only


def test_rows_are_measured_in_order_and_stored_with_where_they_come_from(ran):
    found = rows.Rows(ran[0] / "gpu.json").rows
    mine = {row["peer"]: row for row in found.values() if row["tiny"]}
    assert set(mine) == {"checkpoint", "memo@checkpoint", agenda.TILES}
    assert mine["memo@checkpoint"]["budget"] == mine["checkpoint"]["peak"]
    for row in mine.values():
        assert "failed" not in row, row
        assert row["losses"] == pytest.approx(mine["checkpoint"]["losses"], rel=1e-4)
        assert row["commit"] == provenance.commit()
        assert row["code"] == roster.code(row["model"], row["peer"])
        assert row["torch"]
        assert 0 < row["model_seconds"] < row["seconds"] < row["wall_seconds"]
        assert ("predicted_seconds" in row) == row["peer"].startswith("memo")
    assert mine["memo@checkpoint"]["moved_out"] == mine["memo@checkpoint"]["planned_out"]
    assert mine["memo@checkpoint"]["host_bytes"] == mine["memo@checkpoint"]["planned_host_bytes"]


def test_a_second_run_measures_nothing_again(ran, monkeypatch):
    monkeypatch.setattr(worker, "measure", lambda case: pytest.fail("measured again"))
    assert device.main([*TINY, *ran[1], "--out", str(ran[0])]) == 0


def test_a_row_of_other_code_is_measured_again(ran, tmp_path, monkeypatch):
    (tmp_path / "gpu.json").write_text(
        (ran[0] / "gpu.json").read_text().replace(roster.code("llama-8b", "memo-auto"), "old")
    )
    seen = []
    monkeypatch.setattr(worker, "measure", lambda case: seen.append(case.peer) or row_of(case))
    assert device.main([*TINY, *ran[1], "--out", str(tmp_path)]) == 0
    assert seen == ["memo@checkpoint"]


def test_the_page_has_tables_remarks_and_a_plot(ran):
    page = (ran[0] / "gpu.md").read_text()
    assert "## llama-8b, 1 layers, 128 tokens" in page
    assert (device.RESULTS / pages.REMARKS).read_text() in page
    assert (ran[0] / "gpu.png").stat().st_size > 1000


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "measure", lambda case: pytest.fail("begun"))
    out = ["--out", str(tmp_path), "--only", "llama-8b/*"]
    assert device.main(["--tiny", "--in-process", "--parts", "rows", "--minutes", "0.06", *out]) == 3
    assert device.main(["--tiny", "--parts", "rows", "--minutes", "0.06", "--dry", *out]) == 0
    assert "\nrun " not in capsys.readouterr().out


def test_a_row_that_outlasts_its_time_is_ended_and_begun_again_next_time(stored):
    started = time.monotonic()
    runner = worker.Runner(stored, "a card")
    case = Case("llama-8b", 1, 128, "checkpoint", tiny=True, device="cpu", steps=1)
    assert runner.measure(replace(case, tokens=1 << 19), 8.0) is None
    runner.close()
    assert time.monotonic() - started < 60
    assert not stored.rows


def test_a_process_that_dies_says_its_last_words(monkeypatch):
    case = Case("llama-8b", 1, 128, "checkpoint", tiny=True, device="cpu", steps=1)
    mine = worker.Worker()
    mine.start(replace(case, model="no such model"))
    row = mine.result(case, 120.0)
    assert row["failed"] == "died"
    assert "no such model" in row["said"]
    assert row["peer"] == "checkpoint"


def test_a_row_comes_back_from_a_process_of_its_own(stored):
    runner = worker.Runner(stored, "a card")
    case = Case("llama-8b", 1, 128, "checkpoint", tiny=True, device="cpu", steps=1)
    row = runner.measure(case, 120.0)
    runner.close()
    assert row["losses"]
    assert stored.current("a card", case)["wall_seconds"] > 0


def test_a_row_of_another_card_does_not_count_here_and_comes_last(stored):
    stored.add(row_of(CASE, card="NVIDIA H100"))
    item = Item(CASE.key, CASE)
    assert agenda.state(item, stored, {}, "NVIDIA H200") == "other card"
    assert agenda.state(item, stored, {}, "NVIDIA H100") == "current"
    assert agenda.state(Item("x", replace(CASE, tokens=1)), stored, {}, "NVIDIA H100") == "missing"


def test_what_is_predicted_of_what_is_reserved_counts_what_a_step_begins_with():
    row = {**row_of(CASE), "allocated": 100, "peak": 40, "reserved": 125, "predicted_reserved": 60, "coverage": 1.0}
    assert "-4.00%" in pages._figures(row)
    assert "-4.00%" not in pages._figures({**row, "predicted_reserved": 0})


def test_a_longest_length_is_missing_until_something_has_trained(stored):
    item = Item("longest memo-auto 1")
    assert agenda.resolved(item, stored, "a card") is None
    assert agenda.state(item, stored, {}, "a card") == "missing"


def test_a_failure_that_tells_nothing_of_the_code_is_tried_again(stored):
    item = Item(CASE.key, CASE)
    for failed, state in (("died", "older"), ("ModuleNotFoundError", "older"), ("OutOfMemoryError", "current")):
        stored.add(row_of(CASE, failed=failed, said=""))
        assert agenda.state(item, stored, {}, "NVIDIA H200") == state


def test_what_was_run_beside_rows_stands_on_the_page_with_its_commit():
    part = {"commit": "abc", "code": "c", "seconds": 12.0, "finished": True}
    tests = {**part, "said": {"passed": 61, "wrong": [], "log": "long"}}
    link = {**part, "said": {"to_host_GBs": 55.2345, "both": {"each": 49.9}}}
    page = pages.answers({"NVIDIA H200/tests": tests, "NVIDIA H200/probe link": link})
    assert "- H200/tests (abc, 12 s): passed 61, wrong []" in page
    assert "- H200/probe link (abc, 12 s): to_host_GBs 55.23, both (each 49.9)" in page


def test_what_a_row_took_is_known_of_old_ones_too():
    """Those that do not say have a first step and more of them."""
    row = row_of(CASE, steps=3)
    assert agenda.took({**row, "wall_seconds": 40.0}) == 40.0
    assert agenda.took(row) == agenda.START + 2.0 + 3 * 1.0
    assert agenda.took({"failed": "OutOfMemoryError"}) is None


def test_memo_within_a_peak_needs_that_peak_on_this_card(stored):
    wanted = replace(CASE, peer="memo@checkpoint")
    stored.add(row_of(CASE, card="NVIDIA H100", peak=5))
    assert rows.within(wanted, stored, "NVIDIA H100").budget == 5
    with pytest.raises(rows.NothingToStandOn, match="checkpoint: not measured"):
        rows.within(wanted, stored, "NVIDIA H200")


def test_a_peer_that_ended_at_a_shorter_length_is_not_asked_for_a_longer_one(stored):
    """But memo within another's peak is, since that grows with the length."""
    longer = replace(CASE, tokens=131072)
    for peer in ("checkpoint", "memo@checkpoint+streams"):
        stored.add(row_of(replace(CASE, peer=peer), failed="OutOfMemoryError", said=""))
    stored.add(row_of(replace(longer, peer="checkpoint+streams")))
    assert agenda.why_not(longer, stored, "NVIDIA H200") == "does not fit: ended at 64K tokens"
    assert not agenda.why_not(longer, stored, "NVIDIA H100")
    assert not agenda.why_not(replace(longer, peer="memo@checkpoint+streams"), stored, "NVIDIA H200")
    assert (
        agenda.why_not(replace(CASE, peer="memo@checkpoint"), stored, "NVIDIA H200") == "checkpoint: OutOfMemoryError"
    )
    stored.add(row_of(CASE, failed="OutOfMemoryError", said="", code="old"))
    assert not agenda.why_not(longer, stored, "NVIDIA H200")


def test_the_page_says_of_every_row_of_the_agenda_that_is_missing_why(stored):
    stored.add(row_of(CASE, failed="OutOfMemoryError", said=""))
    page = pages.not_run(stored).splitlines()
    (line,) = [line for line in page if "H200, llama-8b, 4 layers, 128K, does not fit: ended at 64K tokens:" in line]
    assert line.endswith(": checkpoint")
    (line,) = [line for line in page if "H200, llama-8b, 4 layers, 64K, checkpoint: OutOfMemoryError:" in line]
    assert line.endswith(": memo@checkpoint")
    known = {item.case.key for item in agenda.agenda("NVIDIA H200") if item.case is not None}
    said = sum(len(line.rsplit(": ", 1)[1].split(", ")) for line in page if line.startswith("- "))
    assert said == len(known) - 1


def test_older_rows_are_marked_and_cards_stand_side_by_side(stored):
    stored.add(row_of(CASE))
    stored.add(row_of(CASE, card="NVIDIA H100", code="old"))
    stored.add(row_of(replace(CASE, peer="memo@checkpoint"), tokens_per_second=150.0))
    page = pages.tables(stored)
    assert "| peer | H100 tokens/s | H100 MFU | H100 peak GiB | H200 tokens/s | H200 MFU | H200 peak GiB |" in page
    assert "| checkpoint | 100 † | 50.0% | 1.000 | 100 | 50.0% | 1.000 |" in page
    assert "| memo@checkpoint |  |  |  | 150 (1.50 ×) | 50.0% | 1.000 |" in page


def test_the_next_length_is_between_what_ran_and_what_did_not_fit(stored):
    item = Item("longest memo-auto 1")
    assert agenda.resolved(item, stored, "NVIDIA H200") is None
    case = replace(CASE, peer="memo-auto")
    stored.add(row_of(case))
    assert agenda.resolved(item, stored, "NVIDIA H200").tokens == 2 * 65536
    stored.add(row_of(replace(case, tokens=131072), failed="OutOfMemoryError", said=""))
    assert agenda.resolved(item, stored, "NVIDIA H200").tokens == 98304
    stored.add(row_of(replace(case, tokens=98304), failed="RuntimeError", said="no fault of its length"))
    assert rows.longest(stored, "NVIDIA H200", "memo-auto") == (65536, 131072)


def test_every_row_of_the_agenda_is_of_a_known_peer_that_comes_before_memo_within_its_peak():
    names = [item.name for item in agenda.agenda()]
    for item in agenda.agenda():
        if item.case is None:
            continue
        assert roster.is_known(item.case.peer), item
        other = roster.other_of(item.case.peer)
        if other:
            assert names.index(replace(item.case, peer=other).key) < names.index(item.name)


@pytest.mark.parametrize(
    ("log", "passed", "wrong"),
    [
        (
            "[gw1] [  3%] PASSED tests/gpu/a.py::b \n[gw0] [  5%] FAILED tests/gpu/a.py::c[1]",
            1,
            ["tests/gpu/a.py::c[1]"],
        ),
        ("tests/gpu/a.py::b PASSED   [ 50%]\nFAILED tests/gpu/a.py::b - said again", 1, []),
    ],
)
def test_outcomes_are_read_from_a_log_that_may_be_cut_off(log, passed, wrong):
    said = device.outcomes(log)
    assert (said["passed"], said["wrong"]) == (passed, wrong)


def test_verdicts_are_read_where_the_fuzzer_was_ended(tmp_path):
    rows = [{"number": i, "status": status, "detail": "d"} for i, status in enumerate(("right", "right", "poison"))]
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"number": 3, "sta'
    (tmp_path / "memo-cuda-1.jsonl").write_text(text)
    (tmp_path / "memo_eager-cuda-1.jsonl").write_text(text)
    said = device.verdicts(tmp_path, "memo")
    assert said == {"programs": 3, "right": 2, "poison": 1, "wrong": ["2: poison: d"]}


def test_what_a_command_started_ends_with_its_time():
    program = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    ran = device.run_within([sys.executable, "-c", program], 2.0)
    assert ran.code is None
    assert subprocess.run(["ps", "-o", "stat=", "-p", ran.text.strip()], capture_output=True, text=True).stdout[:1] in (
        "",
        "Z",
    )


def test_a_checkout_that_is_not_installed_finds_its_backends():
    program = (
        "from importlib.metadata import entry_points as e; print(*(p.value for p in e(group='torch_dynamo_backends')))"
    )
    ran = device.run_within([sys.executable, "-S", "-c", program], 30.0)
    assert "memo_compile.backend:memo memo_compile.backend:memo_eager" in ran.text


def test_files_are_named_as_git_names_them(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("")
    (tmp_path / "__pycache__").mkdir()
    assert provenance.git_hash(tmp_path / "b.py") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's empty blob
    git = ["git", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "b", "b.py"]):
        subprocess.run([*git, *command], check=True)
    tree = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / ".git").rename(tmp_path.parent / "elsewhere.git")
    assert provenance.git_hash(tmp_path) == tree


def test_code_changes_with_what_a_row_depends_on(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("1")
    before = provenance.code_of(("a",), tmp_path)
    provenance.code_of.cache_clear()
    (tmp_path / "a" / "b.py").write_text("2")
    assert provenance.code_of(("a",), tmp_path) != before
    assert "memo_compile" in roster.sources("llama-8b", "memo@checkpoint")
    assert "memo_compile" not in roster.sources("llama-8b", "checkpoint")


def test_a_probe_that_cannot_run_says_why():
    finished, said, _ = device.probe("nothing", 60.0, "cpu")
    assert not finished
    assert "invalid choice" in said["log"]


def test_a_probes_answer_is_its_last_line():
    finished, said, _ = device.probe("link", 60.0, "cpu")
    assert (finished, said) == (True, {"skipped": "asks a CUDA device"})


LOGS = [
    device.Ran(None, "tests/gpu/a.py::b PASSED\ntests/gpu/a.py::c PASSED"),
    device.Ran(0, "tests/gpu/a.py::d PASSED"),
    device.Ran(device.NOTHING_LEFT, ""),
]


def test_tests_that_passed_before_their_time_was_over_are_not_run_again(monkeypatch):
    asked = []

    def run_within(command, seconds, more):
        asked.append((seconds, more["MEMO_TESTS_DONE"].split()))
        return LOGS[len(asked) - 1]

    monkeypatch.setattr(device, "run_within", run_within)
    finished, said, _ = device.tests(500.0, None)
    assert (finished, said["passed"], said["done"]) == (False, 2, ["tests/gpu/a.py::b", "tests/gpu/a.py::c"])
    finished, said, _ = device.tests(500.0, said)
    assert (finished, said["passed"]) == (True, 3)
    assert device.tests(500.0, said)[0]
    assert asked[0] == (agenda.TESTS_LAST, [])
    assert asked[1][1] == ["tests/gpu/a.py::b", "tests/gpu/a.py::c"]


def test_what_passed_is_deselected(monkeypatch):
    spec = spec_from_file_location("gpu_conftest", Path(__file__).parents[1] / "gpu" / "conftest.py")
    conftest = module_from_spec(spec)
    spec.loader.exec_module(conftest)
    monkeypatch.setenv("MEMO_TESTS_DONE", "a.py::b\na.py::c")
    items = [SimpleNamespace(nodeid=name, add_marker=lambda mark: None) for name in ("a.py::b", "a.py::bb", "a.py::c")]
    gone = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert [item.nodeid for item in items] == ["a.py::bb"]
    assert len(gone) == 2


def test_a_run_of_other_code_is_begun_from_the_start(tmp_path):
    session = device.Session(
        SimpleNamespace(minutes=1, tiny=True, out=tmp_path, in_process=True, parts=["tests"], only=None)
    )
    said = {"passed": 1, "done": ["a"]}
    part = {"finished": False, "said": said, "code": roster.part_code()}
    session.parts[f"{session.card}/tests"] = part
    assert session._cut_off(Item("tests")) == said
    for other in ({**part, "code": "old"}, {**part, "finished": True}):
        session.parts[f"{session.card}/tests"] = other
        assert session._cut_off(Item("tests")) is None


def test_rows_and_answers_that_are_committed_are_taken_over(tmp_path):
    device._take_over(tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads((device.RESULTS / "gpu.json").read_text())
