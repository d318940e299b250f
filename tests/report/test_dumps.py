"""What a dump holds: graphs that are Python, a plan that reads back, an arena."""

import ast
import json

import torch
import zoo

import memo_compile
from memo_compile.schema import Plan


def test_a_dump_holds_graphs_code_plan_and_arena(tmp_path):
    model, x = zoo.make("llama"), zoo.batch(1)
    options = {"memory_budget": "min", "dump": str(tmp_path)}
    torch.compile(model, backend="memo", options=options)(x, labels=x).backward()
    (folder,) = tmp_path.iterdir()
    for name in ("joint", "forward", "backward", "forward_code", "backward_code"):
        ast.parse((folder / f"{name}.py").read_text())
    assert "memo.offload" in (folder / "forward.py").read_text()
    assert "prefetch_" in (folder / "backward.py").read_text()
    assert Plan.from_json((folder / "plan.json").read_text()) == memo_compile.plans()[-1]
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
