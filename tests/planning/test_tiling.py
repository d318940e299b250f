"""Tiles are taken where a budget needs them, as few as it does."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memo_compile
from memo_compile.models import Llama, LlamaConfig
from memo_compile.planning import fit_budget, tiling
from memo_compile.planning.problem import Limits

TOKENS, WORDS, WIDTH = 512, 4096, 16
LOGITS = TOKENS * WORDS * 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids):
        x = torch.tanh(self.words(ids).cumsum(1))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def plan(**options):
    return memo_compile.plan(Model(), (torch.zeros(1, TOKENS, dtype=torch.int64),), options=options)


def calls(found):
    """The tiled calls among what kernels take for themselves."""
    return [w for w in found.workspaces if w.op == "memo.tiled_.default"]


def test_the_least_memory_needs_no_whole_logits():
    whole, tiled = (plan(memory_budget="min", tiles=tiles) for tiles in (1, "auto"))
    assert whole.predicted_peak >= LOGITS
    assert tiled.predicted_peak <= LOGITS / 4
    assert len(calls(tiled)) == 2
    assert not calls(whole)


def test_tiles_are_made_once(monkeypatch):
    made, make = [], tiling._tiled
    monkeypatch.setattr(tiling, "_tiled", lambda p, how: made.append(how) or make(p, how))
    assert calls(plan(memory_budget="min", tiles="auto"))
    assert len(made) == len(set(made)) > 1


def test_a_budget_that_is_kept_without_gets_no_tiles():
    assert not calls(plan(memory_budget=1.0, tiles="auto"))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_budget_below_whole_logits_is_kept_by_tiles(share):
    found = plan(memory_budget=int(share * LOGITS), tiles="auto")
    assert calls(found)
    assert found.predicted_peak <= share * LOGITS


def test_fewer_tiles_where_more_room_is():
    few, many = (calls(plan(memory_budget=int(share * LOGITS), tiles="auto")) for share in (0.9, 0.2))
    assert max(w.bytes for w in few) > max(w.bytes for w in many)


def test_a_wide_mlp_is_made_again_in_the_tiles_that_add_its_gradients_up():
    """No layer's backward needs a value as wide as the MLP."""
    model = Llama(LlamaConfig(vocab=64, layers=2, width=32, heads=4, kv_heads=2, ffn=1024))
    ids = torch.zeros(1, 512, dtype=torch.int64)
    wide = 512 * 1024 * 4
    gradients = sum(p.numel() * 4 for p in model.parameters())
    found = [
        memo_compile.plan(model, (ids, ids), options={"memory_budget": "min", "tiles": tiles}).predicted_peak
        for tiles in (1, 16)
    ]
    assert found[0] >= gradients + 3 * wide
    assert found[1] <= gradients + wide


MIB = 2**20
FIRST, SECOND = 100 * MIB, 11 * MIB  # bytes of what is wide


@pytest.fixture
def ladder(monkeypatch):
    """Numbers of tiles that are worth it, where each (by tiles and what is wide) has a least peak, in MiB."""

    def found(least, free):
        given = SimpleNamespace(cut=None, tokens=SimpleNamespace(tokens=2**20))
        cut = partial(SimpleNamespace, tokens=given.tokens)

        def least_peak(p, _, weightless=frozenset()):
            return (free if weightless else least.get(p.cut, 1000)) * MIB

        monkeypatch.setattr(fit_budget, "tiled", lambda _, tiles, wide, __: cut(cut=(tiles, wide)))
        monkeypatch.setattr(fit_budget, "least_peak", least_peak)
        monkeypatch.setattr(fit_budget, "widest_of", lambda p: (90 if p.cut else 800) * MIB)
        monkeypatch.setattr(fit_budget, "wide_in", lambda p: SECOND if p.cut else FIRST)
        monkeypatch.setattr(fit_budget, "wide_values", lambda _: frozenset({"logits"}))
        return fit_budget._worthwhile(given, Limits(None, 0, objective="memory", tiles="auto"))

    return found


def test_what_is_widest_next_may_need_more_tiles_than_what_was_widest(ladder):
    """As the MLP's values behind logits: 4 tiles do for these, and leave the scratch of both in the way."""
    least = {(4, FIRST): 300, (16, FIRST): 300, (64, FIRST): 299}
    least |= {(4, SECOND): 400, (16, SECOND): 200, (64, SECOND): 150, (256, SECOND): 149}
    assert ladder(least, free=0) == [(4, FIRST), (16, SECOND), (64, SECOND)]


def test_no_tiles_are_tried_where_all_that_is_wide_holds_too_little(ladder):
    least = {(tiles, FIRST): 900 for tiles in (4, 16, 64)}
    assert ladder(least, free=950) == [(4, FIRST)], "0.75 of 50 MiB could be spared, and 3 % of 1000 count"
    assert ladder(least, free=965) == [(16, FIRST)], "15 of 16 parts of 35 MiB, by 16 tiles"
    assert ladder(least, free=970) == []
