"""A second compilation finds the plan and the code of the first, or makes both anew; it never takes another's."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

import memo_compile
from memo_compile.cli import main
from memo_compile.codegen import compiler
from memo_compile.codegen.caching import key, plans
from memo_compile.codegen.caching.entries import entries
from memo_compile.errors import CompiledAutograd, memo_error
from memo_compile.trace import setting

ROWS, WIDTH = 256, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty cache; the C++ kernels of tests before stay."""
    monkeypatch.setenv("MEMO_CACHE", "1")
    monkeypatch.setattr(AOTAutogradCache, "_get_tmp_dir", classmethod(lambda _: str(tmp_path / "kept")))
    monkeypatch.setattr(compiler, "keeps_plans", lambda _: False)
    monkeypatch.setattr(plans, "plans_folder", lambda: tmp_path / "plans")
    return tmp_path / "kept"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with the entry of `step()`, and its plan."""
    kept = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMO_CACHE", "1")
        patch.setattr(AOTAutogradCache, "_get_tmp_dir", classmethod(lambda _: str(kept)))
        patch.setattr(compiler, "keeps_plans", lambda _: False)
        return kept, step()


@pytest.fixture
def first(filled, folder):
    """The plan of `step()`, whose entry is there."""
    shutil.copytree(filled[0], folder)
    return filled[1]


@pytest.fixture
def planned(monkeypatch):
    """How often a graph was planned."""
    made = []

    def counted(*args, **keywords):
        made.append(args)
        return prepare(*args, **keywords)

    prepare = compiler.prepare
    monkeypatch.setattr(compiler, "prepare", counted)
    return made


def made():
    """A model and what it is called with."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double(), torch.randn(ROWS, WIDTH, dtype=torch.float64)


def step(budget="min", again=False, **options):
    """The plan of a step in a process of its own, as far as memo can tell; its gradients are those of eager."""
    torch._dynamo.reset()
    memo_compile.reset()
    model, x = made()
    options = {"memory_budget": budget, "host_budget": 2**24, **options}
    loss = torch.compile(model, backend="memo", options=options)(x).pow(2).sum()
    loss.backward(retain_graph=again)
    if again:
        loss.backward()
    got = [p.grad / (1 + again) for p in model.parameters()]
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    (plan,) = memo_compile.plans()
    return plan


def as_kept(plan):
    return replace(plan, name="", seconds=0.0)


def test_a_hit_carries_out_the_plan_without_making_one(first, planned, caplog):
    with caplog.at_level(logging.INFO, logger="memo_compile"):
        plan = step()
    assert not planned
    assert as_kept(plan) == as_kept(first)
    assert plan.name != first.name
    assert f"{plan.name}: its plan and its code come from the cache" in caplog.text
    assert f"{plan.name} (memo): budget" in caplog.text


def test_a_hit_moves_slices_and_runs_a_second_backward(planned):
    made = step(offload="all")
    assert made.offloaded_bytes
    assert as_kept(step(offload="all", again=True)) == as_kept(made)
    assert len(planned) == 1


def test_two_budgets_never_meet(first, planned):
    large = step(0.95)
    assert first.predicted_peak < large.predicted_peak
    assert len(planned) == 1
    assert (as_kept(step(0.95)), as_kept(step())) == (as_kept(large), as_kept(first))
    assert len(planned) == 1


def torn(path):
    path.write_bytes(path.read_bytes()[:-100])


def changed(path):
    content = bytearray(path.read_bytes())
    at = content.index(b"predicted_peak") + 20
    content[at] ^= 1
    path.write_bytes(bytes(content))


def of_another_budget(path):
    step(0.95)
    (other,) = (e.path for e in entries() if e.path != path)
    path.unlink()
    shutil.copy(other, path.parent)


@pytest.mark.parametrize("spoil", [torn, changed, of_another_budget])
def test_a_faulty_entry_costs_a_compilation_and_nothing_else(spoil, first, planned, capsys):
    (entry,) = entries()
    spoil(entry.path)
    planned.clear()
    assert main(["cache", "check"]) == 1
    assert as_kept(step()) == as_kept(first)
    assert len(planned) == 1
    assert main(["cache", "check"]) == 0
    step()
    assert len(planned) == 1


def test_an_attempt_that_was_thrown_away_is_not_kept(monkeypatch):
    place = compiler._Compilation._place_backward

    def exceeded(self, body):
        if self.scalar:
            raise compiler._Exceeded(self.course.phase)
        return place(self, body)

    alone = []
    monkeypatch.setattr(compiler._Compilation, "_place_backward", exceeded)
    monkeypatch.setattr(compiler, "keeps_plans", lambda _: True)
    monkeypatch.setattr(compiler, "keep", alone.append)
    plan = step()
    assert plan.rounds == 2
    assert len(alone) == 1
    assert [as_kept(e.plan) for e in entries()] == [as_kept(plan)]


def test_nothing_is_kept_or_read_with_a_dump(first, tmp_path, planned):
    step(dump=tmp_path / "dump")
    assert len(planned) == len(list(entries())) == 1
    assert list((tmp_path / "dump").rglob("backward_code.py"))


def test_what_is_found_is_explained_as_what_is_made(first, planned):
    explained = memo_compile.explain(*made(), options={"memory_budget": "min", "host_budget": 2**24})
    assert [g.plan.activations for g in explained.graphs] == [first.activations]
    assert len(planned) == len(list(entries())) == 1
    assert as_kept(step()) == as_kept(first)
    assert len(planned) == 1


def test_torchs_own_switches_hold(monkeypatch):
    setting_ = setting.setting_for(memo_compile.Options(), [])
    graph = torch.fx.symbolic_trace(nn.Linear(1, 1))
    assert key.key_for(setting_, graph, [])
    assert key.key_for(replace(setting_, options=memo_compile.Options(cache=False)), graph, []) is None
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert key.key_for(setting_, graph, []) is None
    with torch._functorch.config.patch(enable_autograd_cache=False):
        assert key.key_for(setting_, graph, []) is None
    with torch.compiler.config.patch(force_disable_caches=True):
        assert key.key_for(setting_, graph, []) is None


def test_the_key_knows_what_a_plan_depends_on(monkeypatch):
    made = setting.with_budget_now(
        setting.setting_for(memo_compile.Options(memory_budget=2**20, host_budget=2**20), [])
    )
    others = [
        replace(made, host=2**21),
        replace(made, calls=2),
        replace(made, given=setting.Given(2**20 - 8, 8)),
        replace(made, options=replace(made.options, offload="all")),
        replace(made, options=replace(made.options, verify="poison")),
        replace(made, profile=replace(made.profile, memory_bandwidth=1.0)),
        replace(made, device=torch.device("cuda", 1)),
    ]
    digests = {key.digest_of(s) for s in [made, *others]}
    assert len(digests) == 1 + len(others)
    assert key.digest_of(replace(made, name="graph_77")) in digests
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert key.digest_of(made) not in digests


def test_a_hit_is_refused_what_a_plan_is_refused(first, monkeypatch):
    monkeypatch.setattr(setting, "under_compiled_autograd", lambda: True)
    with pytest.raises(Exception, match="compiled autograd") as raised:
        step()
    assert isinstance(memo_error(raised.value), CompiledAutograd)


def test_the_command_lists_and_clears(first, capsys, folder):
    assert main(["cache"]) == 0
    assert f"{first.predicted_peak / 2**20:.1f}" in capsys.readouterr().out
    other = folder / "key" / "file"
    other.parent.mkdir()
    other.write_bytes(b"another's")
    assert main(["cache", "clear"]) == 0
    assert list(folder.rglob("*")) == [other.parent, other]
