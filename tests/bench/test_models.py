"""The benchmarks' models: their FLOPs by hand, and that one model is the same whoever wrote it."""

import pytest
import torch

pytest.importorskip("bench.models", reason="the benchmarks lie beside the package, not in it")

from bench import roster
from bench.models import MODELS, HFTrained, blocks_of, head_of, make_model, model_flops

K = 1024
LAYER = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336  # query and out, key and value, the MLP


@pytest.mark.parametrize("name", ["llama-8b", "hf-llama-8b"])
def test_flops_of_llama_8b_by_hand(name):
    """6 a token and weight, the embedding looked up; causal attention 6·S²·4096 a layer."""
    if name.startswith("hf-"):
        pytest.importorskip("transformers")
    trained = make_model(name, 2, 8 * K, "meta")
    by_hand = 6 * 8 * K * (2 * LAYER + 128256 * 4096) + 2 * 6 * (8 * K) ** 2 * 4096
    assert model_flops(trained, 8 * K) == by_hand


def test_flops_of_gpt_7b_by_hand():
    """Tied embeddings are the head's matmul; positions are looked up."""
    by_hand = 6 * 8 * K * (12 * 4096**2 + 50257 * 4096) + 6 * (8 * K) ** 2 * 4096
    assert model_flops(make_model("gpt-7b", 1, 8 * K, "meta"), 8 * K) == by_hand


def test_frozen_weights_need_no_gradient_of_their_own():
    trained = make_model("llama-8b", 1, 8 * K, "meta")
    before = model_flops(trained, 8 * K)
    trained.model.blocks[0].requires_grad_(False)
    assert before - model_flops(trained, 8 * K) == 2 * 8 * K * LAYER


def test_of_experts_those_count_that_a_token_runs_through():
    pytest.importorskip("transformers")
    trained = make_model("hf-qwen3-moe", 1, 8 * K, "meta")
    attention = 2048 * 4096 * 2 + 2048 * 512 * 2
    experts = 8 * 3 * 2048 * 768 + 32 * 2048  # eight of them, and the router
    by_hand = 6 * 8 * K * (attention + experts + 151936 * 2048) + 6 * (8 * K) ** 2 * 4096
    assert model_flops(trained, 8 * K) == by_hand


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_model_trains_and_its_layers_can_be_wrapped(name):
    for prefix, package in (("hf-", "transformers"), ("hf-llama-8b-lora", "peft")):
        if name.startswith(prefix):
            pytest.importorskip(package)
    trained = make_model(name, 1, 32, "cpu", tiny=True)
    assert isinstance(trained, HFTrained) == name.startswith("hf-")
    x = torch.randint(0, head_of(trained).weight.shape[0], (1, 32))
    plain = trained(x, x)
    seen = []

    def wrap(block, *args):
        seen.append(block)
        return block(*args)

    trained.wrap = wrap
    wrapped = trained(x, x)
    assert wrapped == plain
    assert len(seen) == len(blocks_of(trained)) == 1
    wrapped.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_hugging_face_makes_no_mask():
    """One of tokens × tokens would drown all else."""
    pytest.importorskip("transformers")
    trained = make_model("hf-llama-8b", 1, 64, "cpu", tiny=True)
    seen = []
    layer = blocks_of(trained)[0]
    layer.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("attention_mask")), with_kwargs=True)
    trained(torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, 64, dtype=torch.long))
    assert seen == [None]


def test_memo_is_given_hugging_faces_own_loss(monkeypatch):
    """Over whole logits, which nothing returns; it is the chunked one that all others get."""
    pytest.importorskip("transformers")
    trained, given = make_model("hf-llama-8b", 1, 64, "cpu", tiny=True), []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: given.append(kwargs) or model)
    run = roster.make("memo-min", 0)(trained)
    x = torch.randint(0, 64, (1, 64))
    loss = run(x, x)
    torch.testing.assert_close(loss, trained(x, x))
    assert run.model(input_ids=x, labels=x).keys() == {"loss"}
    assert given[0]["options"] == {"memory_budget": "min"}
