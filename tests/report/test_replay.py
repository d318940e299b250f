"""A dump is all that a bug report needs: the passes run again from it, alike, and tell where they no longer do."""

import json
import re
import shutil

import pytest
import torch
import zoo

from memo_compile.cli import main
from memo_compile.errors import NotReplayable
from memo_compile.passes import pipeline
from memo_compile.report.graph_io import graph_from_json, graph_to_json
from memo_compile.report.pass_log import readable
from memo_compile.report.replay import graph_folders, replay


@pytest.fixture
def dumped(eager_dump):
    return eager_dump.folder


@pytest.fixture
def copied(dumped, tmp_path):
    return shutil.copytree(dumped, tmp_path / "copy")


def differing(folder):
    return [done.name for done in replay(folder) if done.differences]


def test_every_pass_does_again_what_it_did(dumped):
    done = list(replay(dumped))
    annotating, acting = ([name for name, _ in passes] for passes in (pipeline.ANNOTATING, pipeline.ACTING))
    assert [d.name for d in done] == ["read", *annotating, "residency", *acting]
    assert [d.differences for d in done] == [()] * len(done)


def test_the_arena_is_laid_out_again_from_what_was_emitted(inductor_dump, tmp_path):
    (folder,) = graph_folders(shutil.copytree(inductor_dump.folder.parent, tmp_path / "copy"))
    done = {d.name: d for d in replay(folder)}
    assert all(not d.differences for d in done.values())
    assert "buffers" in done["arena"].note
    plan = json.loads((folder / "plan.json").read_text())
    plan["buffers"][0]["offset"] += 64
    (folder / "plan.json").write_text(json.dumps(plan))
    assert differing(folder) == ["arena"]


def test_another_decision_shows_at_the_pass_that_takes_it(copied):
    record = json.loads((copied / "compilation.json").read_text())
    record["decided"]["host_bytes"] += 64
    (copied / "compilation.json").write_text(json.dumps(record))
    assert differing(copied) == ["residency"]


def test_a_graph_that_a_pass_writes_otherwise_shows_at_that_pass(copied):
    (path,) = copied.glob("passes/*-prefetches/backward.after.py")
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "= torch.ops.aten.mm" in line)
    path.write_text("\n".join([*lines[:at], *lines[at + 1 :]]))
    assert differing(copied) == ["prefetches"]


def test_another_token_axis_shows_at_tokens(copied):
    (path,) = copied.glob("passes/*-tokens/found.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": 1}))
    assert differing(copied) == ["tokens"]


def test_the_command_says_same_or_where_it_differs(dumped, copied, capsys):
    assert main(["replay", str(dumped)]) == 0
    assert "the plan is the dump's" in capsys.readouterr().out
    record = json.loads((copied / "compilation.json").read_text())
    home = next(iter(record["homes"]))
    record["homes"][home] = [7, 7, 0, 0]
    record["ahead"] = record.pop("overlap")  # as dumps of before have it
    (copied / "compilation.json").write_text(json.dumps(record))
    assert main(["replay", str(copied)]) == 1
    shown = capsys.readouterr().out
    assert f"{home}: kept 7" in shown
    assert "the plan differs" in shown


def test_a_folder_without_a_dump_is_refused_with_what_to_do(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "MEMO_DUMP" in capsys.readouterr().err


def test_a_dump_runs_no_one_elses_code(copied):
    path = copied / "joint.json"
    raw = json.loads(path.read_text())
    call = next(n for n in raw["graph"]["nodes"] if n["op"] == "call_function")
    call["target"] = {"function": "os:system"}
    path.write_text(json.dumps(raw))
    with pytest.raises(NotReplayable, match="os:system"):
        list(replay(copied))


def test_no_tensor_data_is_written(dumped):
    """The only long rows of numbers in a dump are names and counts: nothing of a parameter's or an input's values."""
    model = zoo.make("gpt-dropout")
    values = [f"{v:.10f}" for p in model.parameters() for v in p.detach().flatten()[:3].tolist()]
    for path in dumped.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not [v for v in values if v in text and abs(float(v)) > 1e-4 and float(v) not in (0.02, 1.0)], path


def test_a_graph_comes_back_as_it_was():
    def f(x):
        return torch.nn.functional.gelu(x @ x.t()).sum() * float("inf")

    gm = torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode="fake")(torch.ones(3, 3, dtype=torch.bfloat16))
    text = json.dumps(graph_to_json(gm))
    again = graph_from_json(json.loads(text))
    assert readable(again) == readable(gm)
    for a, b in zip(gm.graph.nodes, again.graph.nodes, strict=True):
        if "val" in a.meta:
            assert (a.meta["val"].shape, a.meta["val"].dtype) == (b.meta["val"].shape, b.meta["val"].dtype)
    assert json.dumps(graph_to_json(again)) == text
    assert not re.search(r"\[\[?[0-9.]+, [0-9.]+, [0-9.]+, [0-9.]+", text)
