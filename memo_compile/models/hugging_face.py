"""Hugging Face's models at small sizes, training: what tests and benchmarks try beside memo's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NO_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}  # of special tokens, nor a cache


def hf_llama(
    *, vocab: int, layers: int, width: int, heads: int, kv_heads: int, ffn: int, **more: Any
) -> torch.nn.Module:
    """`LlamaForCausalLM`; `more` goes to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM  # optional, and slow to import

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **{**NO_IDS, **more},
    )
    return _in_one_graph(LlamaForCausalLM(config))


def hf_gpt2(*, vocab: int, layers: int, width: int, heads: int, tokens: int, dropout: float = 0.0) -> torch.nn.Module:
    """`GPT2LMHeadModel` for sequences of up to `tokens`."""
    from transformers import GPT2Config, GPT2LMHeadModel  # optional, and slow to import

    config = GPT2Config(
        vocab_size=vocab,
        n_positions=tokens,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        **NO_IDS,
    )
    return _in_one_graph(GPT2LMHeadModel(config))


def _in_one_graph(model: Any) -> Any:
    model.loss_type = "ForCausalLM"  # left to itself, transformers looks it up with a warning, which breaks the graph
    return model.train()
