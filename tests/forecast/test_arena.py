"""An arena without emitted code: every byte that the program and the simulator count has an offset."""

from collections import Counter
from itertools import accumulate

import pytest
import torch

from memo_compile.forecast.arena import offline_arena, row_buffers, transient_buffers
from memo_compile.forecast.repeat_layers import lengthened
from memo_compile.models import GPT, GPTConfig
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.planning.problem import Limits
from memo_compile.planning.search import best_of
from memo_compile.planning.simulate import simulate
from memo_compile.trace.offline import trace

TOKENS = 4096


def traced(layers):
    model = GPT(GPTConfig(vocab=64, layers=layers, width=64, heads=4, tokens=TOKENS))
    x = torch.zeros(1, TOKENS, dtype=torch.int64)
    return trace(model, (x,), {"labels": x}, {"hardware": "a800"})[0]


@pytest.fixture(scope="module")
def short():
    return traced(4)


@pytest.fixture(scope="module")
def limits(short):
    return Limits(int(0.5 * short.unplanned_peak), 1 << 30)


@pytest.fixture(scope="module")
def decided(short, limits):
    long = lengthened(short, limits, 12)
    problem, decision, _ = best_of(long.view, limits)
    return long, problem, decision.residency


def live(buffers, steps):
    change = [0] * (steps + 1)
    for b in buffers:
        change[b.start] += b.size
        change[b.end] -= b.size
    return list(accumulate(change))[:-1]


def test_transients_of_repeated_layers_are_what_the_program_counts(short, decided):
    long, _, _ = decided
    base = long.view.problem.base_bytes
    buffers, _ = transient_buffers(short, long)
    # A saved view of an input is counted by the program; it has no bytes of its own. What kernels take for themselves,
    # and results before they are unpacked, are counted and lie outside of the arena.
    beside = [lifetimes(gm, fused=True).workspaces for gm in (short.forward, short.backward)]
    taken = {0}.union(*(w.values() for w in beside))
    differences = {b - t for b, t in zip(base, live(buffers, len(base)), strict=True)}
    assert differences <= {view + w for view in (0, 8 * (TOKENS - 1)) for w in taken}
    assert differences >= taken
    assert max(base) > 1 << 20


def test_repeated_layers_have_the_transients_of_traced_ones(short, limits):
    def in_layers(p):
        buffers, layer_of = transient_buffers(p, lengthened(p, limits, 6))
        return Counter((b.size, b.end - b.start, layer_of[b.name]) for b in buffers if b.name in layer_of)

    copied, whole = in_layers(short), in_layers(traced(6))
    assert copied == whole
    assert {layer for *_, layer in whole} == set(range(12))


def test_rows_live_as_the_simulator_moves_them(short, decided):
    _, problem, residency = decided
    assert any(h.offloaded for h in residency.values())
    played = simulate(problem, residency)
    rows = list(row_buffers(problem, residency, played))
    counted = [b + r for b, r in zip(problem.base_bytes, live(rows, len(problem.seconds)), strict=True)]
    assert counted == pytest.approx([held for _, held in played.memory], abs=len(problem.activations))


def test_the_arena_is_as_small_as_what_is_live(short, decided):
    arena = offline_arena(short, *decided)
    assert arena.bytes <= 1.001 * arena.lower_bound
    assert arena.buffers > 12 * 20
