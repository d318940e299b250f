"""Models by name: their published sizes, and one rank's share of them on tensors without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from memo_compile import plan
from memo_compile.errors import InvalidOption
from memo_compile.forecast.presets import PRESETS, build
from memo_compile.schema import Cause

PUBLISHED = {
    "gpt-7b": 6.65e9,
    "gpt-13b": 12.85e9,
    "gpt-30b": 29.96e9,
    "gpt-65b": 64.85e9,
    "llama-1b": 1.236e9,
    "llama-3b": 3.213e9,
    "llama-8b": 8.030e9,
    "llama-70b": 70.55e9,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_sizes(name):
    assert PRESETS[name].parameters == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize("name", ["gpt-7b", "llama-1b", "llama-8b"])
def test_a_preset_says_how_many_parameters_its_model_has(name):
    found = PRESETS[name]
    for layers in (1, 2):
        model = build(name, 256, layers=layers).model
        padding = (model.config.vocab - found.vocab) * found.width
        counted = sum(p.numel() for p in model.parameters()) - padding
        assert counted == layers * found.layer_parameters + found.other_parameters


def test_nothing_is_allocated():
    built = build("gpt-65b", 1 << 20, ranks=8, layers=2)
    assert all(isinstance(p, FakeTensor) and p.dtype == torch.bfloat16 for p in built.model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_a_rank_has_its_share_of_heads_features_words_and_tokens():
    whole, rank = build("llama-8b", 4096, layers=1), build("llama-8b", 4096, ranks=8, layers=1)
    assert rank.args[0].shape == (1, 512)
    shapes = {name: tuple(p.shape) for name, p in rank.model.named_parameters()}
    assert shapes["blocks.0.attention.query.weight"] == (512, 4096)
    assert shapes["blocks.0.attention.key.weight"] == (128, 4096)
    assert shapes["blocks.0.mlp.down.weight"] == (4096, 1792)
    assert shapes["head.weight"] == (128256 // 8 // 128 * 128 + 128, 4096)
    assert sum(p.numel() for p in whole.model.parameters()) > 7 * sum(p.numel() for p in rank.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "gpt-8b", "tokens": 64}, "preset"),
        ({"name": "gpt-7b", "tokens": 64, "ranks": 3}, "tp"),
        ({"name": "llama-8b", "tokens": 64, "ranks": 16}, "tp"),
        ({"name": "gpt-7b", "tokens": 1001, "ranks": 8}, "seq"),
        ({"name": "gpt-7b", "tokens": 0}, "seq"),
        ({"name": "gpt-7b", "tokens": 64, "layers": 0}, "layers"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, named):
    with pytest.raises(InvalidOption, match=f"'{named}'"):
        build(**arguments)


@pytest.mark.parametrize("name", ["gpt-7b", "llama-8b"])
def test_the_token_axis_runs_through_the_collectives(name):
    """Rows of a rank's shard and of the gathered values are slices of one axis, and both can be recomputed."""
    built = build(name, 8192, ranks=8, layers=2)
    made = plan(built.model, built.args, built.kwargs, {"memory_budget": "min", "hardware": "a800"})
    large = [a for a in made.activations if a.bytes > 2**20]
    assert {a.tokens for a in large} == {1024}
    inside = [a for a in large if 8192 in a.shape]
    assert any("mm" in a.name and a.cause is Cause.SLICED for a in inside)
