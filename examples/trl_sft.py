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
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import memo_compile
from memo_compile.data import PadToLengths

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
    # Padding to few lengths is not needed. Where it is done, ranges end at these lengths, which is a little faster.
    lengths = [a.tokens // 2, a.tokens]
    model.compile(backend=a.backend, options={"memory_budget": "min", "lengths": lengths})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=a.steps,
            max_length=a.tokens,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            disable_tqdm=True,
        )
        texts = [" ".join([TEXT] * (1 + i % (a.tokens // 16))) for i in range(64)]
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": texts}),
            data_collator=PadToLengths(lengths, collate=DataCollatorForLanguageModeling(pad_token_id=0)),
            processing_class=words,
        )
        result = trainer.train()
    for plan in memo_compile.plans():
        print(f"planned peak {plan.predicted_peak / 2**20:.1f} MiB of {plan.unplanned_peak / 2**20:.1f} MiB unplanned")
    return float(result.training_loss)


if __name__ == "__main__":
    main()
