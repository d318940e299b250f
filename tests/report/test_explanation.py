"""`explain` says what would be done and why, without a step."""

import io

import pytest
import torch
import zoo
from rich.console import Console

import memo_compile
from memo_compile.errors import UnknownOption


@pytest.fixture(scope="module")
def explained():
    """GPT-2 with an S × S mask, and a graph break after it."""
    model, x = zoo.make("hf-gpt2"), zoo.batch(1)
    ran = []
    handles = [p.register_hook(lambda g: ran.append(g)) for p in model.parameters()]

    def step(x):
        loss = model(x, labels=x).loss
        torch._dynamo.graph_break()
        return (loss * model.lm_head.weight).sum()

    found = memo_compile.explain(step, x, options={"memory_budget": "min"})
    for handle in handles:
        handle.remove()
    assert not ran
    return found


def test_it_goes_on_after_a_break_and_says_why_it_broke(explained):
    assert len(explained.graphs) == 2
    assert len(explained.breaks) == 1
    assert "graph_break" in explained.breaks[0].reason
    assert "test_explanation.py" in explained.breaks[0].source


def test_a_mask_that_grows_with_the_square_of_the_tokens_stands_out(explained):
    squares = [row for row in explained.graphs[0].largest if row.quadratic]
    assert squares
    assert all(row.shape.count(zoo.TOKENS) >= 2 for row in squares)
    assert any("sdpa_attention.py" in row.source for row in squares)
    # The MLP of this model is as wide as there are tokens: that is no square.
    assert not [row for row in squares if "pytorch_utils.py" in row.source or "activations.py" in row.source]
    assert "grow with the square of the tokens" in str(explained)
    assert "128] S×S" in str(explained)


def test_it_says_what_is_saved_and_who_reads_it(explained):
    graph = explained.graphs[0]
    assert sum(row.bytes * row.count for row in graph.saved) == sum(a.bytes for a in graph.plan.activations)
    assert all(row.kept + row.offloaded + row.recomputed == pytest.approx(1) for row in graph.saved)
    attention = next(row for row in graph.saved if "sdpa_attention.py" in row.source and len(row.shape) == 4)
    assert any("attention" in reader for reader in attention.readers)
    assert graph.inputs_read > 0


def test_it_says_where_the_layers_activations_live(explained):
    layers = [row for row in explained.graphs[0].layers if row.modules.endswith(".h")]
    assert sum(row.count for row in layers) == 2
    assert all(row.kept + row.offloaded + row.recomputed == pytest.approx(1) for row in layers)
    assert sum(row.bytes for row in explained.graphs[0].layers) == sum(
        a.bytes for a in explained.graphs[0].plan.activations
    )


def test_it_places_the_arena_and_says_what_binds(explained):
    plan = explained.graphs[0].plan
    assert plan.arena_bytes >= plan.lower_bound > 0
    assert plan.predicted_peak <= plan.unplanned_peak
    assert plan.binding
    text = str(explained)
    for word in ("budget", "lower bound", "binding", "where the token axis ends", "residency by layers"):
        assert word in text


def test_it_prints_in_a_terminal_and_in_a_notebook(explained):
    stream = io.StringIO()
    Console(file=stream, width=120, force_terminal=True).print(explained)
    assert "largest tensors" in stream.getvalue()
    page = explained._repr_html_()
    assert page.count("<table>") == page.count("</table>") > 4
    assert "sdpa_attention.py" in page


def test_a_budget_that_cannot_be_kept_is_said_and_the_least_is_explained():
    weight = torch.ones(256, 256, requires_grad=True)
    found = memo_compile.explain(
        lambda x: (x @ weight).relu().sum(), torch.ones(64, 256), options={"memory_budget": 1024}
    )
    (graph,) = found.graphs
    assert "cannot be kept" in graph.refused
    assert graph.plan.predicted_peak > 1024
    assert "cannot be kept" in str(found)


def test_a_graph_without_gradients_has_nothing_to_explain():
    found = memo_compile.explain(lambda x: x.relu() * 2, torch.ones(4))
    assert found.graphs[0].plan is None
    assert "needs no gradient" in str(found)


def test_a_mistake_in_the_options_is_named():
    with pytest.raises(UnknownOption, match="memory_bugdet"):
        memo_compile.explain(lambda x: x, torch.ones(4), options={"memory_bugdet": 1})
