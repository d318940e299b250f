"""The least plan's transfers overlap with computation, in the same bytes."""

import pytest
import torch

from memo_compile.codegen import arrange, rehearsal
from memo_compile.codegen.planned_step import plan_step
from memo_compile.models import Llama, LlamaConfig
from memo_compile.runtime.ops import register

register()


def least(monkeypatch, *, moved):
    """The plan of a small model at "min" on a device whose link is slow beside its arithmetic."""
    if not moved:
        monkeypatch.setattr(rehearsal.Rehearsal, "_overlapping", lambda self, decided, front, back, plain: plain)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = Llama(LlamaConfig(512, 2, 1024, 8, 4, 2816, 1e4))
        tokens = torch.zeros(1, 8192, dtype=torch.int64)
    return (
        plan_step(
            mode, lambda x: model(x).sum(), (tokens,), {}, {"memory_budget": "min", "hardware": "h100", "tiles": 1}
        )
        .graphs[0]
        .plan
    )


def test_the_step_gets_shorter_and_the_peak_stays(monkeypatch):
    faster = least(monkeypatch, moved=True)
    plain = least(monkeypatch, moved=False)
    assert faster.offloaded_bytes == plain.offloaded_bytes > 0
    assert faster.predicted_peak == plain.predicted_peak
    assert faster.predicted_seconds < 0.98 * plain.predicted_seconds


def test_an_order_that_holds_more_is_not_taken(monkeypatch):
    monkeypatch.setattr(arrange.Arrangement, "lines", lambda self, emission, backward: _all_prefetches_first(emission))
    crowded = least(monkeypatch, moved=True)
    assert crowded.predicted_peak == least(monkeypatch, moved=False).predicted_peak


def _all_prefetches_first(emission):
    """Every prefetch buffer held from the beginning on."""
    first = [t for t in emission.lines if "prefetch_" in t]
    places = {t.split("(")[1].split(",")[0] for t in first} | {
        t.split("reinterpret_tensor(")[-1].split(",")[0] for t in first
    }
    made = [t for t in emission.lines if t.split(" = empty_strided")[0].strip() in places]
    return [*made, *(t for t in emission.lines if t not in made)]


@pytest.mark.parametrize("op", ["mm", "addmm"])
def test_a_line_with_a_matmul_costs_what_its_node_costs(op):
    """`extern_kernels` and memo's own matmuls into rows have the price of the node that they come from."""
    from memo_compile.codegen.emitted.line_costs import line_seconds
    from memo_compile.codegen.preview import dry_emission
    from memo_compile.hardware.profiles import resolve
    from memo_compile.passes.analysis.costs import graph_costs

    def run(x, w, b):
        return (torch.mm(x, w) if op == "mm" else torch.addmm(b, x, w),)

    fake = torch._subclasses.FakeTensorMode()
    gm = torch.fx.experimental.proxy_tensor.make_fx(run, tracing_mode="fake")(
        torch.ones(256, 128), torch.ones(128, 64), torch.ones(64)
    )
    profile = resolve("h100", "cuda")
    with fake:
        emission = dry_emission(gm, is_backward=False)
    with emission.at_hand():
        got = sum(line_seconds(emission.lines, profile))
    assert got == pytest.approx(sum(c.seconds for c in graph_costs(gm, profile).values()), rel=0.2)
