"""The models that the tests train: tiny, in float64, training, the same from one seed."""

import torch
import transformers

from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig, hugging_face

TOKENS = 128
SMALL = {"vocab": 64, "layers": 2, "width": 32, "heads": 4}


def llama():
    return Llama(LlamaConfig(**SMALL, kv_heads=2, ffn=96))


def one_layer_llama():
    """The least that has everything, for tests that compile several times."""
    torch.manual_seed(0)
    return Llama(LlamaConfig(**{**SMALL, "layers": 1}, kv_heads=2, ffn=96)).double().train()


def gpt(dropout=0.0, layers=2):
    return GPT(GPTConfig(**{**SMALL, "layers": layers}, tokens=TOKENS, dropout=dropout))


def one_layer_gpt(dropout=0.0):
    """The same of GPT."""
    torch.manual_seed(0)
    return gpt(dropout, layers=1).double().train()


def hf_llama():
    return hugging_face.hf_llama(**SMALL, kv_heads=2, ffn=96)


def hf_gpt2(dropout=0.0):
    return hugging_face.hf_gpt2(**SMALL, tokens=TOKENS, dropout=dropout)


def hf_bert(dropout=0.0):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=TOKENS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForMaskedLM(config)


MODELS = {
    "llama": llama,
    "gpt": gpt,
    "gpt-dropout": lambda: gpt(0.1),
    "hf-llama": hf_llama,
    "hf-gpt2": hf_gpt2,
    "hf-gpt2-dropout": lambda: hf_gpt2(0.1),
    "hf-bert": hf_bert,
    "hf-bert-dropout": lambda: hf_bert(0.1),
}


def make(name):
    """The model of that name, from seed 0, in float64, training."""
    torch.manual_seed(0)
    return MODELS[name]().double().train()


def batch(size, tokens=TOKENS):
    return torch.randint(0, 64, (size, tokens), generator=torch.Generator().manual_seed(1))


def loss_of(result):
    return result if isinstance(result, torch.Tensor) else result.loss


def gradients(model, fn, x):
    """Loss and gradients of one step of `fn`, which runs `model`, from one seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = loss_of(fn(x, labels=x))
    loss.backward()
    return loss.detach().clone(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, share=1e-10):
    """Every gradient within that share of its norm, or of a thousandth of the largest norm in the model."""
    largest = max(g.norm() for g in expected.values())
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        allowed = share * max(gradient.norm(), 1e-3 * largest)
        assert (got[name] - gradient).norm() <= allowed, name
