"""Two lists hold the order of the passes, and all that runs, shows or replays passes derives from them."""

import json
from importlib.util import find_spec

import pytest
import torch

from memo_compile.passes import pipeline
from memo_compile.report.replay import graph_folders, replay

PARTS = ("memo_compile.passes.analysis", "memo_compile.passes.transforms", "memo_compile")


@pytest.mark.parametrize("passes", [pipeline.ANNOTATING, pipeline.ACTING], ids=["annotating", "acting"])
def test_one_pass_is_one_name_and_one_file(passes):
    names = [name for name, _ in passes]
    assert len(set(names)) == len(names)
    assert all(any(find_spec(f"{part}.{name}") for part in PARTS) for name in names)


def test_what_a_pass_finds_is_there_for_those_after_it(monkeypatch):
    first = ("first", lambda joint, found: {"seen": sorted(found)})
    second = ("second", lambda joint, found: found["first"])
    monkeypatch.setattr(pipeline, "ANNOTATING", (first, second))
    shown = []
    joint = pipeline.Joint(torch.fx.GraphModule({}, torch.fx.Graph()), (), 0, None, None, False, None, None)
    found = pipeline.annotate(joint, lambda name, graphs, found: shown.append((name, list(graphs), found)))
    assert found == {"first": {"seen": []}, "second": {"seen": []}}
    assert shown == [("first", ["joint"], {"seen": []}), ("second", ["joint"], {"seen": []})]


def test_a_pass_is_added_by_one_line(monkeypatch, tmp_path):
    """Planning runs it, the dump shows its graphs and what it found, and a replay runs it again."""
    ran = []

    def count_matmuls(joint):
        ran.append(joint)
        return {"matmuls": sum(n.target is torch.ops.aten.mm.default for n in joint.graph.nodes)}

    def tag(graphs):
        graphs.forward.graph.find_nodes(op="output")[0].prepend(graphs.forward.graph.call_function(torch.ones, (1,)))
        graphs.forward.recompile()
        return graphs

    counting = ("matmuls", lambda joint, found: count_matmuls(joint.graph))
    monkeypatch.setattr(pipeline, "ANNOTATING", (*pipeline.ANNOTATING, counting))
    monkeypatch.setattr(pipeline, "ACTING", (*pipeline.ACTING, ("tagged", lambda decision, graphs: tag(graphs))))
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Sigmoid(), torch.nn.Linear(32, 32))
    options = {"memory_budget": "min", "dump": str(tmp_path)}
    torch.compile(model, backend="memo_eager", options=options)(torch.ones(4096, 32)).sum().backward()
    (folder,) = graph_folders(tmp_path)
    (found,) = folder.glob("passes/*-matmuls/found.json")
    assert json.loads(found.read_text())["matmuls"] > 0
    (diff,) = folder.glob("passes/*-tagged/diff.txt")
    assert "forward: " in diff.read_text()
    assert "1 added" in diff.read_text()
    again = {done.name: done.differences for done in replay(folder)}
    assert again["matmuls"] == again["tagged"] == ()
    assert len(ran) == 2
