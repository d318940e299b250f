"""Hugging Face's models at small sizes, training: what tests and benchmarks try beside memo's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NO_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}  # of special tokens, nor a cache


def hf_decoder(
    family: str, *, vocab: int, layers: int, width: int, heads: int, kv_heads: int, ffn: int, **more: Any
) -> torch.nn.Module:
    """`LlamaForCausalLM` and those that are configured alike: "Llama", "Qwen3", "Gemma2". `more` goes to the config."""
    import transformers  # optional, and slow to import

    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **{**NO_IDS, **more},
    )
    return _in_one_graph(getattr(transformers, f"{family}ForCausalLM")(config))


def hf_llama(
    *, vocab: int, layers: int, width: int, heads: int, kv_heads: int, ffn: int, **more: Any
) -> torch.nn.Module:
    """`LlamaForCausalLM`; `more` goes to its config."""
    sizes = {"vocab": vocab, "layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
    return hf_decoder("Llama", **sizes, **more)


def hf_t5(*, vocab: int, layers: int, width: int, heads: int, ffn: int) -> torch.nn.Module:
    """`T5ForConditionalGeneration` without dropout; encoder and decoder of `layers` each, the head tied."""
    from transformers import T5Config, T5ForConditionalGeneration  # optional, and slow to import

    special: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
    config = T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=width // heads,
        d_ff=ffn,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        **special,
    )
    return _in_one_graph(T5ForConditionalGeneration(config))


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
