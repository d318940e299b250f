"""What a dump holds: graphs that are Python, a plan that reads back, an arena."""

import ast
import json
import shutil

import torch
import zoo

from memo_compile.passes import pipeline
from memo_compile.registry import registry
from memo_compile.report.dumps import Dump
from memo_compile.report.page import read_reports
from memo_compile.report.replay import graph_folders
from memo_compile.schema import Plan


def test_a_dump_holds_graphs_code_plan_and_arena(inductor_dump):
    folder = inductor_dump.folder
    for name in ("joint", "forward", "backward", "forward_code", "backward_code"):
        ast.parse((folder / f"{name}.py").read_text())
    assert "memo.offload" in (folder / "forward.py").read_text()
    assert "prefetch_" in (folder / "backward.py").read_text()
    assert Plan.from_json((folder / "plan.json").read_text()) == inductor_dump.plan
    arena = json.loads((folder / "arena.json").read_text())
    assert {"name", "segment", "offset", "size", "start", "end"} <= arena["buffers"][0].keys()
    annotated = (folder / "annotated.py").read_text()
    assert "saved activation" in annotated
    assert "token-wise" in annotated
    assert "offloaded" in annotated


def test_the_environment_asks_for_a_dump(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMO_DUMP", str(tmp_path))
    model, x = zoo.make("llama"), zoo.batch(1)
    torch.compile(model, backend="memo_eager")(x, labels=x).backward()
    names = {path.name for path in tmp_path.glob("*/*")}
    assert {"joint.py", "forward.py", "backward.py", "plan.json"} <= names


def test_what_another_run_left_is_left_alone(tmp_path):
    taken = tmp_path / f"graph_{registry().count}"
    taken.mkdir()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 8))
    torch.compile(model, backend="memo_eager", options={"dump": str(tmp_path)})(torch.ones(64, 8))
    assert not list(taken.iterdir())
    assert [f.name for f in graph_folders(tmp_path)] == [f"{taken.name}_2"]
    assert [r["plan"]["name"] for r in read_reports(tmp_path)] == [f"{taken.name}_2"]


def test_a_graph_that_is_planned_once_more_keeps_its_folder(tmp_path):
    first, second = (Dump.open(str(tmp_path), "graph_0").folder for _ in range(2))
    assert first == second == tmp_path / "graph_0"


def test_ranks_write_side_by_side(tmp_path, monkeypatch):
    for name, value in {"is_initialized": True, "get_world_size": 8, "get_rank": 3}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert Dump.open(str(tmp_path), "graph_0").folder == tmp_path / "rank_3_graph_0"


def test_each_pass_leaves_its_graphs_and_what_it_did(inductor_dump):
    folder = inductor_dump.folder
    for number, (name, _) in enumerate((*pipeline.ANNOTATING, *pipeline.ACTING), start=1):
        passed = folder / f"passes/{number}-{name}"
        assert (passed / "diff.txt").read_text().startswith(f"{name}\n")
        for path in passed.glob("*.py"):
            ast.parse(path.read_text())
        assert {p.name.split(".")[1] for p in passed.glob("*.py")} == {"before", "after"}
    said = {path.parent.name.partition("-")[2]: path.read_text() for path in folder.glob("passes/*/diff.txt")}
    slices = said["slices"]
    assert "memo.offload.default" in slices
    assert "go to the host" in slices
    assert "come back from the host" in slices
    assert "the copy starts, early enough" in said["prefetches"]


def test_the_simulated_step_opens_in_perfetto(inductor_dump):
    """Chrome's trace format: complete events on named threads, and memory as a counter."""
    trace = json.loads((inductor_dump.folder / "simulated.trace.json").read_text())["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in trace if e["ph"] == "M"}
    assert set(threads.values()) == {"compute", "d2h", "h2d"}
    complete = [e for e in trace if e["ph"] == "X"]
    moved = {a.name for a in inductor_dump.plan.activations if a.offloaded}
    assert moved
    for stream in ("d2h", "h2d"):
        assert {e["name"] for e in complete if threads[e["tid"]] == stream} == moved
    forward = (inductor_dump.folder / "forward.py").read_text()
    assert any(e["name"] in forward for e in complete if threads[e["tid"]] == "compute")
    assert all(e["dur"] > 0 and e["ts"] >= 0 for e in complete)
    assert any(e["ph"] == "C" and e["args"]["bytes"] > 0 for e in trace)


def test_one_layer_is_a_picture_with_live_ranges_and_homes(eager_dump):
    folder = eager_dump.folder
    dot = (folder / "layer.dot").read_text()
    assert "blocks" in dot
    assert "live [" in dot
    assert "cluster_forward" in dot
    assert "cluster_backward" in dot
    assert "forward/" in dot
    if shutil.which("dot"):
        assert (folder / "layer.svg").read_text().rstrip().endswith("</svg>")
