"""TRL's SFTTrainer, offline, with a tokenizer and a model made here. As for the Trainer, `model.compile` comes first.

python examples/trl_sft.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import memo_compile

TEXT = "memory is what a long context needs and what a device has not"


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words in `TEXT`."""
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(TEXT.split()))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096
    )


def main(argv: list[str] | None = None) -> float:
    """Train; returns the mean loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="memo", help="memo, or memo_eager to debug")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    a = parser.parse_args(argv)

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=a.width,
        intermediate_size=3 * a.width,
        num_hidden_layers=a.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"  # else transformers looks it up in the forward, which breaks the graph
    # "min", since TRL computes the loss in a graph of its own, which has no room to spare for a ratio
    model.compile(backend=a.backend, options={"memory_budget": "min"})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=a.steps,
            max_length=a.tokens,
            pad_to_multiple_of=a.tokens,  # one length, one plan
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,  # memo decides what is recomputed
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict({"text": [TEXT] * 64}), processing_class=words
        )
        result = trainer.train()
    for plan in memo_compile.plans():
        print(f"planned peak {plan.predicted_peak / 2**20:.1f} MiB of {plan.unplanned_peak / 2**20:.1f} MiB unplanned")
    return float(result.training_loss)


if __name__ == "__main__":
    main()
