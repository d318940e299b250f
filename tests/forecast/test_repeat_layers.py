"""A few layers traced and repeated stand for all of them."""

import pytest

from memo_compile.errors import NothingToPlan
from memo_compile.forecast import presets
from memo_compile.forecast.repeat_layers import lengthened
from memo_compile.planning.problem import Limits
from memo_compile.planning.search import best_of
from memo_compile.trace.offline import trace

GIB = 2**30
TOKENS, RANKS = 1 << 20, 8


# GiB of ample and of scarce room. Llama's float32 logits alone are 64 GiB with their gradient.
ROOM = {"gpt-7b": {"ample": 60, "scarce": 40}, "llama-8b": {"ample": 100, "scarce": 70}}


@pytest.fixture(scope="module", params=["gpt-7b", pytest.param("llama-8b", marks=pytest.mark.grid)])
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def traces(preset):
    """Traces of 4 and of 8 layers of one model."""
    built = [presets.build(preset, TOKENS, ranks=RANKS, layers=n) for n in (4, 8)]
    return [trace(b.model, b.args, b.kwargs, {"hardware": "a800"})[0] for b in built]


@pytest.mark.parametrize("room", ["ample", "scarce"])
def test_repeating_layers_equals_tracing_all(preset, traces, room):
    limits = Limits(ROOM[preset][room] * GIB, 16 * GIB)
    short, whole = (lengthened(p, limits, 8) for p in traces)
    assert len(short.view.order) == len(whole.view.order)
    assert short.flops == whole.flops
    assert short.forward_flops == whole.forward_flops
    assert sum(short.view.problem.seconds) == pytest.approx(sum(whole.view.problem.seconds), rel=1e-9)
    answers = [best_of(long.view, limits) for long in (short, whole)]
    (_, a, fits), (_, b, _) = answers
    assert fits
    assert a.recompute_seconds + a.stall_seconds > 0
    assert a.seconds == pytest.approx(b.seconds, rel=1e-4)
    assert a.peak == pytest.approx(b.peak, rel=1e-3)
    totals = [
        sum(x.bytes * d.residency[x.name].offloaded / x.tokens for x in problem.activations)
        for problem, d, _ in answers
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-2)


def test_copies_stand_where_their_layers_do(traces):
    limits = Limits(60 * GIB, 16 * GIB)
    long = lengthened(traces[0], limits, 8)
    steps = len(long.view.problem.seconds)
    layers = [n for n in long.view.order if long.layer[n] is not None]
    assert sorted({long.layer[n] for n in layers}) == list(range(8))
    produced = [long.view.activations[n].produced for n in long.view.order]
    assert produced == sorted(produced)
    for name in long.view.order:
        a = long.view.activations[name]
        assert (
            a.produced
            <= a.last_forward
            < long.view.problem.forward_steps
            <= a.first_backward
            <= a.last_backward
            < steps
        )
        assert all(long.view.activations[s].produced < a.produced for s in long.view.needs[name])


def test_too_few_layers_to_tell_are_refused():
    built = presets.build("gpt-7b", 8192, ranks=8, layers=2)
    p, _ = trace(built.model, built.args, built.kwargs, {"hardware": "a800"})
    with pytest.raises(NothingToPlan, match="--trace-layers"):
        lengthened(p, Limits(None, 0), 8)
