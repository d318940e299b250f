"""What a dry run says is what is emitted; where it is not, what is emitted counts."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.fx as fx
import zoo

import memo_compile
from memo_compile.codegen import lowered, rehearsal
from memo_compile.codegen.planned_step import plan_step
from memo_compile.codegen.preview import dry_emission, dry_run
from memo_compile.models import Llama, LlamaConfig
from memo_compile.passes.fx.build import call
from memo_compile.runtime.ops import register

register()
ROWS, KEPT, WIDTH = 64, 16, 32


def graph_that_keeps(keep):
    """`x + 1`, of which only the last rows are returned."""
    from torch._subclasses import FakeTensorMode

    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(ROWS, WIDTH)
    value = call(graph, torch.ops.aten.add.Tensor, (x, 1))
    rows = call(graph, torch.ops.aten.slice.Tensor, (value, 0, ROWS - KEPT, ROWS))
    graph.output((call(graph, keep, (rows,)),))
    return fx.GraphModule({}, graph)


def test_rows_that_stay_do_not_hold_the_rows_that_left():
    body = dry_run(graph_that_keeps(torch.ops.memo.keep.default), is_backward=False)
    assert body.storages[body.outputs[0]].bytes == KEPT * WIDTH * 4


def test_a_clone_would_hold_them():
    """The reason for `memo::keep`. When this fails, torch no longer drops such a clone, and one op less is needed."""
    body = dry_run(graph_that_keeps(torch.ops.aten.clone.default), is_backward=False)
    assert body.storages[body.outputs[0]].bytes == ROWS * WIDTH * 4


def deceived(monkeypatch, *, backward, whenever):
    """Dry runs of one of the graphs that see half of each buffer, where `whenever` says so."""

    def looked(gm, *, is_backward, scalar, keep, **kwargs):
        emission = dry_emission(gm, is_backward=is_backward, scalar=scalar, keep=keep, **kwargs)
        body = emission.body
        if is_backward != backward or not whenever(scalar or keep):
            return emission
        halved = {n: replace(s, bytes=s.bytes // 2) for n, s in body.storages.items() if s.kind == "allocated"}
        return replace(emission, body=replace(body, storages={**body.storages, **halved}))

    monkeypatch.setattr(rehearsal, "dry_emission", looked)


def lowerings(monkeypatch):
    """Counts the graphs that Inductor lowers."""
    from torch._inductor.graph import GraphLowering

    lowered, run = [], GraphLowering.run
    monkeypatch.setattr(GraphLowering, "run", lambda self, *args: lowered.append(self) or run(self, *args))
    return lowered


SMALLEST, ROOMY = {"memory_budget": "min", "offload": "all"}, {"memory_budget": 2**40}


@pytest.mark.parametrize(
    ("options", "differs", "graphs"), [(SMALLEST, False, 2), (SMALLEST, True, 4), (ROOMY, False, 2)]
)
def test_what_a_dry_run_has_lowered_is_emitted_unless_anything_else_is_given(options, differs, graphs, monkeypatch):
    model, x = zoo.one_layer_llama(), zoo.batch(1)
    expected = zoo.gradients(model, model, x)
    if differs:
        read = itertools.count()
        monkeypatch.setattr(lowered, "settings_of_inductor", lambda: {"one": str(next(read))})
    counted = lowerings(monkeypatch)
    got = zoo.gradients(model, torch.compile(model, backend="memo", options=options), x)
    zoo.assert_close(got[1], expected[1])
    assert len(counted) == graphs
    assert all(graph.codegen.__name__ == "codegen" for graph in counted)  # what stands in is gone again


@pytest.mark.parametrize("backward", [False, True])
def test_a_graph_that_differs_from_its_dry_run_is_placed_as_it_is_emitted(backward, monkeypatch):
    model, x = zoo.make("llama"), zoo.batch(1)
    expected = zoo.gradients(model, model, x)
    deceived(monkeypatch, backward=backward, whenever=lambda _: True)
    got = zoo.gradients(model, torch.compile(model, backend="memo"), x)
    zoo.assert_close(got[1], expected[1])
    model.zero_grad(set_to_none=True)


def test_a_budget_holds_for_what_is_emitted(monkeypatch):
    model, x = zoo.one_layer_llama(), zoo.batch(1)
    expected = zoo.gradients(model, model, x)
    attempts = []
    deceived(monkeypatch, backward=True, whenever=lambda first: attempts.append(first) or all(attempts))
    fn = torch.compile(model, backend="memo", options={"memory_budget": 0.8})
    got = zoo.gradients(model, fn, x)
    zoo.assert_close(got[1], expected[1])
    model.zero_grad(set_to_none=True)
    plan = memo_compile.plans()[-1]
    assert memo_compile.measure_peak(lambda: fn(x, labels=x).backward()) <= plan.budget
    assert attempts[0]
    assert not all(attempts)


@pytest.mark.parametrize(
    ("budget", "graphs"),
    [(0.65, 4), (lambda peak: int(0.65 * peak), 2), pytest.param(lambda peak: peak, 4, marks=pytest.mark.grid)],
)
def test_what_holds_nothing_back_is_looked_at_only_where_it_may_be_within_the_budget(budget, graphs, monkeypatch):
    """A ratio is of what Inductor would hold; two thirds of that in bytes need no dry run to be told apart from it."""
    looks = []
    monkeypatch.setattr(rehearsal, "dry_emission", lambda gm, **how: looks.append(gm) or dry_emission(gm, **how))
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model, x = Llama(LlamaConfig(64, 3, 32, 4, 2, 96, 1e4)), torch.zeros(1, 512, dtype=torch.int64)
    if callable(budget):
        budget = budget(plan_step(mode, model, (x,), {}, {}).graphs[0].plan.unplanned_peak)
        looks.clear()
    plan_step(mode, model, (x,), {}, {"memory_budget": budget})
    assert len(looks) == graphs
