"""Bytes that a rank holds beside activations, against the table of the ZeRO paper."""

import pytest

from memo_compile.errors import InvalidOption
from memo_compile.forecast.parallel import Layout, layout, model_state

BILLION = 10**9


# arXiv 1910.02054, table 1: a model of 7.5 billion parameters on 64 devices, GB for each.
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_stages_hold_what_the_zero_paper_says(stage, gigabytes):
    state = model_state(int(7.5 * BILLION), 0, Layout(64, 1, stage))
    assert state.total / BILLION == pytest.approx(gigabytes, rel=0.01)


def test_what_is_gathered_in_passing_counts():
    state = model_state(10_000, 1_000, Layout(8, 1, 3))
    assert state.gathered == 2 * 1_000 * 2 + 1_000 * 2
    assert model_state(10_000, 1_000, Layout(8, 8, 3)).gathered == 0  # one replica shares with nobody


def test_ranks_that_share_tokens_share_the_model_state_too():
    shared, replicas = layout(8, 1, 3, cp=8), layout(8, 1, 3)
    assert (shared.replicas, replicas.replicas) == (1, 8)
    assert model_state(10_000, 1_000, shared) == model_state(10_000, 1_000, replicas)


def test_host_memory_is_shared_by_the_devices_of_a_machine():
    assert Layout(8, 8, 1).host_share(2 * 2**40) == 256 * 2**30
    assert Layout(64, 8, 1).host_share(2 * 2**40) == 256 * 2**30
    assert Layout(1, 1, 1).host_share(2 * 2**40) == 2 * 2**40


@pytest.mark.parametrize(
    ("gpus", "tp", "zero", "named"), [(0, 1, 1, "--gpus"), (8, 3, 1, "--tp"), (16, 16, 1, "--tp"), (8, 8, 4, "--zero")]
)
def test_layouts_that_cannot_be_are_refused(gpus, tp, zero, named):
    with pytest.raises(InvalidOption, match=named):
        layout(gpus, tp, zero)
