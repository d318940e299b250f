"""`memo check` on a tiny model: the same twice, and each deliberate regression is found and explained."""

import itertools
import json
import textwrap

import pytest
import torch

from memo_compile.cli import main
from memo_compile.errors import BudgetTooSmall, InvalidTarget
from memo_compile.models import Llama, LlamaConfig
from memo_compile.passes import pipeline
from memo_compile.passes.analysis import token_rules, tokens
from memo_compile.regression import baseline, check

pytest_plugins = ["pytester"]
LOOSE = baseline.tolerances(["planning=20"])  # the machine that tests is shared


def small():
    """A model of which all that can be is offloaded."""
    model = Llama(LlamaConfig(vocab=64, layers=1, width=32, heads=4, kv_heads=2, ffn=96))
    x = torch.randint(0, 64, (1, 256))
    return model, (x,), {"labels": x}, {"memory_budget": "min"}


def converted():
    """A model that changes its dtype while it is made."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Sigmoid()).to(torch.bfloat16)
    return model, (torch.ones(512, 64, dtype=torch.bfloat16),)


def broken():
    """Two graphs."""
    model = Llama(LlamaConfig(vocab=64, layers=1, width=32, heads=4, kv_heads=2, ffn=96))

    def run(x):
        y = model.embedding(x)
        torch._dynamo.graph_break()
        return model.head(y * torch.arange(32)).sum()

    return run, (torch.randint(0, 64, (1, 256)),)


@pytest.fixture(scope="module")
def before():
    return check.measure("small", small, "h100")


def regressions(before):
    changes = baseline.compare("small", before, check.measure("small", small, "h100"), LOOSE)
    return {c.metric: c for c in changes if c.regression}


def test_figures_are_those_of_a_real_plan_and_the_same_again(before):
    assert before.metrics["arena"] >= 1.0
    assert 0 < before.metrics["coverage"] <= 1.0
    assert before.metrics["out"] == before.metrics["in"] == sum(t.offloaded for t in before.tensors) > 0
    assert before.metrics["breaks"] == before.metrics["unsliceable"] == 0
    assert not any(t.source.startswith("/") for t in before.tensors)
    again = check.measure("small", small, "h100")
    assert {**again.metrics, "planning": 0} == {**before.metrics, "planning": 0}
    assert again.tensors == before.tensors


def test_a_pass_switched_off_is_found(before, monkeypatch):
    monkeypatch.setattr(pipeline, "annotate_tokens", lambda joint, _: tokens.annotate_tokens(joint, []))
    found = regressions(before)
    assert "unsliceable" in found
    assert any("bytes cannot be sliced" in line and "llama.py" in line for line in found["unsliceable"].blame)


def test_a_slice_rule_removed_is_found(before, monkeypatch):
    monkeypatch.delitem(token_rules.RULES, "aten::mm")
    found = regressions(before)
    assert "unsliceable" in found
    assert "aten.mm" in found["unsliceable"].blame[0]


def test_a_spoiled_placement_is_found(before, monkeypatch):
    from memo_compile.codegen.arena import layout as arena
    from memo_compile.placement import Placement

    def side_by_side(buffers, layer_of, *, alignment, **_):
        sizes = [-(-b.size // alignment) * alignment for b in buffers]
        starts = itertools.accumulate(sizes, initial=sum(sizes))
        offsets = {b.name: start for b, start in zip(buffers, starts, strict=False)}
        return Placement(offsets, 2 * sum(sizes), 0, False, "no room is used twice", 0.0)

    monkeypatch.setattr(arena, "place_layers", side_by_side)
    found = regressions(before)
    assert {"arena", "peak"} <= found.keys()
    assert "live; " in found["arena"].blame[0]


def test_graph_breaks_are_counted_and_their_reasons_kept():
    figures = check.measure("broken", broken, "h100")
    assert figures.metrics["breaks"] == len(figures.notes["breaks"]) == 1
    assert "graph_break" in figures.notes["breaks"][0]


def test_a_model_may_be_converted_while_it_is_made():
    assert check.measure("converted", converted, "h100").metrics["peak"] >= 512 * 64 * 2


def test_a_budget_that_cannot_be_kept_is_a_refusal():
    with pytest.raises(BudgetTooSmall):
        check.measure("refused", lambda: (*small()[:3], {"memory_budget": "1KiB"}), "h100")


@pytest.fixture
def canned(before, monkeypatch):
    """Nothing is planned: `figures["now"]` are what any target comes to."""
    figures = {"now": before}
    monkeypatch.setattr(check, "measure", lambda target, make, hardware: figures["now"])
    return figures


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module `cases` in it."""
    (tmp_path / "cases.py").write_text("def first():\n    pass\n\n\ndef second():\n    pass\n\n\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def worse(figures):
    return baseline.Figures({**figures.metrics, "peak": 2 * figures.metrics["peak"]}, figures.tensors, figures.notes)


def test_the_command_updates_compares_and_fails(canned, here, capsys):
    command = ["check", "--baseline", "b.json", "cases:first", "cases:second"]
    assert main([*command, "--hardware", "h100", "--update"]) == 0
    assert main(command) == 0
    assert "2 targets: nothing changed" in capsys.readouterr().out
    canned["now"] = worse(canned["now"])
    assert main(command) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert main([*command, "--tolerance", "peak=1"]) == 0
    capsys.readouterr()
    assert main([*command, "--format", "github"]) == 1
    annotations = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::error")]
    assert [line.partition(",title")[0] for line in annotations] == [
        "::error file=cases.py,line=1",
        "::error file=cases.py,line=5",
    ]
    assert main([*command, "--format", "json"]) == 1
    assert any(row["regression"] for row in json.loads(capsys.readouterr().out))


def test_an_update_of_one_target_keeps_the_others(canned, here):
    for target in ("cases:first", "cases:second"):
        assert main(["check", "--baseline", "b.json", target, "--hardware", "h100", "--update"]) == 0
    assert baseline.load(here / "b.json").targets.keys() == {"cases:first", "cases:second"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cases:first"], "there is no baseline"),
        (["cases:first", "--update"], "--hardware"),
        (["cases:third", "--update", "--hardware", "h100"], "'cases:third' is no target"),
        (["nowhere:first", "--update", "--hardware", "h100"], "No module named"),
        (["cases", "--update", "--hardware", "h100"], "does not name a module and a function"),
        (["cases:number", "--update", "--hardware", "h100"], "cannot be called"),
        (["cases:first", "--tolerance", "speed=1"], "--tolerance"),
    ],
)
def test_mistakes_end_in_a_message(arguments, message, here, capsys):
    assert main(["check", "--baseline", "b.json", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_baseline_for_other_hardware_or_other_targets_is_refused(canned, here, capsys):
    assert main(["check", "--baseline", "b.json", "cases:first", "--hardware", "h100", "--update"]) == 0
    assert main(["check", "--baseline", "b.json", "cases:first", "--hardware", "a100"]) == 2
    assert "is for h100, not a100" in capsys.readouterr().err
    assert main(["check", "--baseline", "b.json", "cases:second"]) == 2
    assert "has no figures of cases:second" in capsys.readouterr().err


@pytest.mark.parametrize("made", [None, (torch.nn.Linear(1, 1),), (3, ()), (torch.relu, 3)])
def test_a_target_that_makes_no_model_is_refused(made):
    with pytest.raises(InvalidTarget, match=r"\(model, args"):
        check.measure("wrong", lambda: made, "h100")


def test_a_target_that_fails_is_refused():
    with pytest.raises(InvalidTarget, match="ZeroDivisionError"):
        check.measure("wrong", lambda: 1 // 0, "h100")


def test_the_fixture_passes_fails_and_updates(canned, pytester):
    pytester.makepyfile(
        textwrap.dedent("""
        def small():
            pass

        def test_small(memo_check):
            memo_check(small, baseline="h100.json", hardware="h100")
        """)
    )
    plugin = ("-p", "memo_compile.testing", "-p", "no:cacheprovider", "-p", "no:unraisableexception")
    assert pytester.runpytest_inprocess(*plugin, "--memo-update").parseoutcomes()["passed"] == 1
    assert pytester.runpytest_inprocess(*plugin).parseoutcomes()["passed"] == 1
    canned["now"] = worse(canned["now"])
    result = pytester.runpytest_inprocess(*plugin)
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*peak*REGRESSION*"])
