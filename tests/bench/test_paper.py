"""The paper's figures, and each baseline against a formula worked out by hand: none is weaker than it must be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("bench.paper", reason="the benchmarks lie beside the package, not in it")

from bench.paper import GPUS, K, case, flops_of, head_seconds, row_of, seconds_of, stack_of
from memo_compile.forecast.strategies import (
    full_recompute,
    full_swap,
    input_swap,
    keep_all,
    largest_alpha,
    one_alpha,
    outcomes,
    planned,
)

GIB = 2**30
ALL = 1 << 50


def roomy(c):
    """The same cell with memory for everything."""
    return replace(c, budget=ALL, host=ALL)


def layer_seconds(c):
    forward, backward = seconds_of(c)
    return sum(forward.values()), sum(backward.values())


def plain_seconds(c):
    """Nothing recomputed, nothing waited for: layers forward and backward, and the head."""
    return c.preset.layers * sum(layer_seconds(c)) + head_seconds(c)


def shorter(c, layers):
    return replace(c, preset=replace(c.preset, layers=layers))


def test_a_layer_saves_sixteen_units_and_the_model_4096_gib():
    stack = stack_of(case("gpt-7b", K * K))
    assert sum(a.bytes for a in stack.problem.activations) * 8 / GIB == pytest.approx(4096, rel=0.01)
    assert sum(a.bytes for a in stack.problem.activations if stack.layer[a.name] == 5) * 8 / GIB == pytest.approx(
        128, rel=0.01
    )


def test_flops_of_a_layer_worked_out_by_hand():
    """24·s·h² for the matmuls and 2·s²·h for causal attention, over 8 ranks."""
    s, h = 128 * K, 4096
    assert sum(flops_of(case("gpt-7b", s)).values()) == pytest.approx((24 * s * h * h + 2 * s * s * h) / 8)


def test_attention_is_over_nine_tenths_of_a_layers_forward_past_576k_tokens():
    """Communication left out: the paper's profile is of one layer's kernels."""
    c = replace(case("gpt-7b", 576 * K), profile=replace(case("gpt-7b", K).profile, link=1e15))
    forward, _ = seconds_of(c)
    assert forward["attention"] / sum(forward.values()) > 0.9


@pytest.mark.parametrize("tokens", [64 * K, 256 * K, K * K])
def test_keep_all_takes_the_sum_of_all_steps(tokens):
    c = roomy(case("gpt-7b", tokens))
    assert keep_all(stack_of(c)).played.seconds == pytest.approx(plain_seconds(c), rel=0.02)


@pytest.mark.parametrize("tokens", [64 * K, 256 * K, K * K])
def test_full_recompute_runs_each_layer_again_but_for_its_last_matmul(tokens):
    c = roomy(case("gpt-7b", tokens))
    forward, _ = seconds_of(c)
    again = c.preset.layers * (sum(forward.values()) - forward["narrow"])
    assert full_recompute(stack_of(c)).played.seconds == pytest.approx(plain_seconds(c) + again, rel=0.02)


@pytest.mark.parametrize("tokens", [64 * K, 256 * K, K * K])
def test_input_swap_costs_what_full_recompute_does_while_inputs_hide(tokens):
    c = roomy(case("gpt-7b", tokens))
    assert c.unit / c.profile.d2h < layer_seconds(c)[0]
    stack = stack_of(c)
    assert input_swap(stack).played.seconds == pytest.approx(full_recompute(stack).played.seconds, rel=0.02)


def test_full_swap_waits_for_the_link_at_short_lengths():
    """All leaves before the first can come back; then each layer takes the longer of its gradients and its copies."""
    c = roomy(case("gpt-7b", 32 * K))
    copy = 16 * c.unit / c.profile.d2h
    forward, backward = layer_seconds(c)
    assert copy > forward
    by_hand = min(m * copy + m * max(copy, backward) for m in (c.preset.layers - last for last in range(3)))
    assert full_swap(stack_of(c)).played.seconds == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize("tokens", [256 * K, 512 * K])
def test_full_swap_at_long_lengths_costs_nothing(tokens):
    c = replace(case("gpt-7b", tokens), host=ALL)
    assert full_swap(stack_of(c)).played.seconds == pytest.approx(plain_seconds(c), rel=0.02)


@pytest.mark.parametrize("rate", [11e9, 12.5e9, 14e9])
def test_full_swap_of_7b_starts_to_hide_between_128k_and_256k(rate):
    """With room for two layers' slices beside what a layer needs to run, as the paper's two buffers have."""
    for tokens, hides in ((128 * K, False), (256 * K, True)):
        c = case("gpt-7b", tokens, rate=rate)
        assert (16 * c.unit / rate <= layer_seconds(c)[0]) == hides
        working = max(stack_of(c).problem.base_bytes)
        played = full_swap(stack_of(replace(c, host=ALL, budget=working + 2 * 16 * c.unit))).played
        assert (played.seconds <= 1.001 * plain_seconds(c)) == hides


@pytest.mark.parametrize("tokens", [128 * K, 512 * K, K * K])
def test_alpha_recomputes_the_rest_of_all_but_two_layers(tokens):
    c = case("gpt-7b", tokens)
    forward, _ = seconds_of(c)
    outcome = one_alpha(stack_of(c))
    rest = sum(forward[s] for s in ("norm1", "qkv", "out", "norm2", "wide", "gelu"))
    share = int(64 * outcome.share) / 64
    by_hand = plain_seconds(c) + (c.preset.layers - 2) * (1 - share) * rest
    assert outcome.played.seconds == pytest.approx(by_hand, rel=0.02)


def test_alpha_at_7b_and_1m_is_bounded_by_two_terabytes_of_host_memory():
    c = case("gpt-7b", K * K)
    low, high = (largest_alpha(stack_of(replace(c, host=host // 8))) for host in (2 * 10**12, 2 * 2**40))
    assert 0.41 <= low <= high <= 0.47
    assert largest_alpha(stack_of(replace(c, host=ALL))) == 1.0


@pytest.mark.parametrize("tokens", [128 * K, K * K])
def test_memo_is_no_slower_than_any_and_predicts_what_is_played(tokens):
    found = outcomes(stack_of(shorter(case("gpt-7b", tokens), 12)))
    ours = found["memo"]
    others = [o.played.seconds for name, o in found.items() if o and name != "memo"]
    assert ours.played.seconds <= 1.001 * min(others)
    assert ours.predicted.seconds == pytest.approx(ours.played.seconds, rel=0.03)
    assert ours.predicted.peak == pytest.approx(ours.played.peak, rel=0.01)


@pytest.mark.parametrize("hardware", ["a800-80gb", "h200"])
@pytest.mark.parametrize("tokens", [2 * K, 8 * K, 16 * K])
@pytest.mark.parametrize("room", [1.0, 0.6])
def test_sense_at_short_lengths(hardware, tokens, room):
    """Never slower than the best of keeping all, where it fits, full recomputation and layer-input offload."""
    c = shorter(case("gpt-7b", tokens, hardware=hardware), 8)
    stack = stack_of(roomy(c))
    budget = int(keep_all(stack).played.peak * room) + 4096
    stack = replace(stack, problem=replace(stack.problem, budget=budget))
    best = min(o.played.seconds for o in (keep_all(stack), full_recompute(stack), input_swap(stack)) if o)
    assert planned(stack).played.seconds <= 1.001 * best


def test_the_committed_table_holds_at_every_point():
    rows = json.loads((Path(__file__).parents[2] / "bench" / "results" / "paper.json").read_text())["rows"]
    assert {r["model"] for r in rows} == set(GPUS)
    for r in rows:
        others = [
            n for n in ("keep all", "full recompute", "full swap", "input swap", "alpha", "whole tensors") if r[n]
        ]
        assert r["memo"] or not others
        if r["memo"]:
            assert r["memo"]["predicted_over_simulated_seconds"] == pytest.approx(1, rel=0.03)
            assert r["memo"]["predicted_over_simulated_peak"] == pytest.approx(1, rel=0.01)
        for name in others:
            assert r["memo"]["seconds"] <= 1.001 * r[name]["seconds"], (r["model"], r["tokens"], name)


def test_a_row_has_every_strategy():
    row = row_of(shorter(case("gpt-7b", 64 * K), 4))
    assert row["memo"]["seconds"] <= row["full recompute"]["seconds"]
