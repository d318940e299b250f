"""What a few layers of a deep stack hold tells what Inductor would hold of all."""

import pytest
import torch
import zoo

from memo_compile.codegen import rehearsal
from memo_compile.codegen.planned_step import plan_step
from memo_compile.models import Llama, LlamaConfig, hugging_face
from memo_compile.passes.transforms.fewer_layers import MANY

DEEP = {**zoo.SMALL, "layers": MANY + 2}
MODELS = {
    "llama": lambda: Llama(LlamaConfig(**DEEP, kv_heads=2, ffn=96)),
    "hf-llama": lambda: hugging_face.hf_llama(**DEEP, kv_heads=2, ffn=96),
}


class Collecting(torch.nn.Module):
    """Returns what each layer makes: none of them can be left out."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(MANY + 2))

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = torch.nn.functional.silu(layer(x)) + x
            found.append(x)
        return tuple(found)


def planned(make, given, budget=0.6):
    """The unplanned peak, and the nodes of each graph that was looked at."""
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode()
    with mode:
        torch.manual_seed(0)
        model, x = make().train(), given()
    keywords = {"labels": x} if x.dtype is torch.int64 else {}
    return plan_step(mode, model, (x,), keywords, {"memory_budget": budget}).graphs[0].plan.unplanned_peak


def tokens():
    return torch.zeros(1, zoo.TOKENS, dtype=torch.int64)


@pytest.fixture
def looked_at(monkeypatch):
    """The nodes of all forwards that were looked at."""
    seen, original = [], rehearsal.Rehearsal.dry

    def dry(self, decided):
        seen.append(len(decided.forward.graph.nodes))
        return original(self, decided)

    monkeypatch.setattr(rehearsal.Rehearsal, "dry", dry)
    return seen


@pytest.mark.parametrize("name", ["llama", pytest.param("hf-llama", marks=pytest.mark.grid)])
def test_a_few_layers_tell_to_the_byte_what_all_hold(name, looked_at, monkeypatch):
    few = planned(MODELS[name], tokens)
    assert looked_at[0] < looked_at[1] < looked_at[2] / 2, "three layers, four, and then the plan's own graphs"
    monkeypatch.setattr(rehearsal, "with_fewer_layers", lambda *_: None)
    assert few == planned(MODELS[name], tokens)


def test_layers_that_are_all_returned_are_all_looked_at(looked_at):
    planned(Collecting, lambda: torch.randn(512, 32))
    assert looked_at[0] >= 2 * (MANY + 2)


def test_at_the_whole_peak_all_layers_are_looked_at_since_the_compilation_goes_on_with_them(looked_at):
    planned(MODELS["llama"], tokens, budget=1.0)
    assert len(looked_at) == 1
