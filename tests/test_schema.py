"""A plan goes to JSON and back."""

import json
from dataclasses import replace

import pytest
import torch
import zoo

import memo_compile
from memo_compile import logs, schema
from memo_compile.regression import check
from memo_compile.report.explain import unsliced_rows
from memo_compile.schema import ActivationPlan, ArenaBuffer, Binding, Cause, Plan, Side, Stop


def test_a_plan_reads_back_equal():
    plan = memo_compile.plan(zoo.make("llama"), (zoo.batch(1),), {"labels": zoo.batch(1)}, {"memory_budget": "min"})
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version"):
        Plan.from_json('{"version": 99}')


def test_a_plan_says_where_each_activation_comes_from_and_where_it_goes():
    model, x = zoo.make("llama"), zoo.batch(1)
    plan = memo_compile.plan(model, (x,), {"labels": x}, {"memory_budget": "min"})
    assert all(p.grad is None for p in model.parameters())
    assert plan.activations
    for a in plan.activations:
        assert a.kept + a.offloaded + a.recomputed == a.tokens
        assert a.bytes == torch.empty(a.shape, dtype=getattr(torch, a.dtype)).nbytes
    assert any("llama.py" in a.source for a in plan.activations)
    assert plan.predicted_peak < plan.unplanned_peak


@pytest.mark.parametrize("text", ["[]", "3", '{"version": 1}', "{}"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"plan"):
        Plan.from_json(text)


LAST_BITS = "its last bits decide something, or it must not run twice"
MIXES = "aten.sum mixes tokens"
OF_VERSION_1 = (
    ("kept: the budget allows it", Cause.FITS, ""),
    ("kept: below 65536 bytes", Cause.SMALL, "65536 bytes"),
    ("kept: its storage is an output's or another value's", Cause.SHARED_STORAGE, ""),
    ("kept: a policy of the user's checkpoints says so", Cause.POLICY_KEPT, ""),
    ("offloaded: a policy of the user's checkpoints says so", Cause.POLICY_OFFLOADED, ""),
    ("whole: no token axis reaches it", Cause.NO_TOKEN_AXIS, ""),
    ("sliced", Cause.SLICED, ""),
    (f"sliced; not recomputed: {LAST_BITS}", Cause.SLICED_NOT_RECOMPUTED, ""),
    (f"sliced; recomputed whole or not at all: {MIXES}", Cause.SLICED_RECOMPUTED_WHOLE, MIXES),
)


def plan_with(causes):
    """A plan of one activation for each cause, each of 1 MiB, and of one buffer a side."""
    activations = tuple(
        ActivationPlan(f"a{i}", (1024, 256), "float32", 2**20, f"m.py:{i}: y", 1024, 512, 512, 0, cause, detail)
        for i, (cause, detail) in enumerate(causes)
    )
    numbers = ("predicted_peak", "least_peak", "unplanned_peak", "host_bytes", "forward_flops", "recomputed_flops")
    return Plan(
        **dict.fromkeys(numbers, 1),
        name="graph_0",
        backend="memo",
        budget=1,
        predicted_seconds=1.0,
        solver="highs",
        seconds=1.0,
        token_axis="",
        binding=Binding.HOST_MEMORY,
        prices={Binding.HOST_MEMORY: 0.5},
        activations=activations,
        stops=(Stop("cumsum", "aten.cumsum.default", "m.py:2: z", "reads across the token axis"),),
        buffers=tuple(ArenaBuffer(side, "buf0", "memo_arena_0", 0, 64, 0, 6) for side in Side),
    )


def test_a_plan_of_version_1_reads_as_it_was():
    """It said causes in words, and sides in the names of buffers."""
    plan = plan_with([(cause, detail) for _, cause, detail in OF_VERSION_1])
    raw = json.loads(plan.to_json()) | {"version": 1}
    assert [a["reason"] for a in raw["activations"]] == [reason for reason, _, _ in OF_VERSION_1]
    for a in raw["activations"]:
        del a["cause"], a["detail"]
    for b, side in zip(raw["buffers"], ("fw", "bw"), strict=True):
        del b["side"]
        b["name"] = f"{side}:{b['name']}"
    assert Plan.from_json(json.dumps(raw)) == plan


def figures(plan):
    """What checks, logs and explanations count."""
    tensors = [check._tensor(a, None) for a in plan.activations]
    return tensors, [replace(row, reason="") for row in unsliced_rows(plan)], len(list(logs.advice(plan)))


def test_rewording_a_message_changes_no_figure(monkeypatch):
    plan = plan_with([(cause, detail) for _, cause, detail in OF_VERSION_1])
    before = figures(plan)
    assert [t.whole > 0 for t in before[0]] == [cause is Cause.NO_TOKEN_AXIS for _, cause, _ in OF_VERSION_1]
    assert len(before[1]) == 4
    assert before[2] == 2
    monkeypatch.setattr(schema, "_WORDS", dict.fromkeys(Cause, "sliced: kept, whole: no token axis, on the host"))
    assert figures(plan) == before
    assert Plan.from_json(plan.to_json()) == plan
