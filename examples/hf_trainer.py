"""Hugging Face's Trainer. Its own `torch_compile_backend` takes names from a closed list, which memo is not on:
compile the model first, with `model.compile(backend="memo")`, and leave the Trainer's options for compilation alone.

    python examples/hf_trainer.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import memo_compile
from memo_compile.data import PadToLengths


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards, each of another length. One plan serves a range of lengths."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(self.tokens - 5 * index % self.tokens // 2) + index) % 128
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def together(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of one batch, padded to the longest of them; a tokenizer's collator does the same."""
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {k: pad_sequence([row[k] for row in rows], batch_first=True, padding_value=fill[k]) for k in fill}


def main(argv: list[str] | None = None) -> float:
    """Train; returns the mean loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="memo", help="memo, or memo_eager to debug")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    a = parser.parse_args(argv)

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=a.width,
        intermediate_size=3 * a.width,
        num_hidden_layers=a.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"  # else transformers looks it up in the forward, which breaks the graph
    memo_compile.loss_only(model)  # else the logits are a result, held whole in every step
    # Padding to few lengths is not needed. Where it is done, ranges end at these lengths, which is a little faster.
    lengths = [a.tokens * 3 // 4, a.tokens]
    model.compile(backend=a.backend, options={"memory_budget": 0.6, "lengths": lengths})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=a.steps,
            per_device_train_batch_size=1,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        collate = PadToLengths(lengths, collate=together)
        result = Trainer(model=model, args=arguments, train_dataset=Counting(a.tokens), data_collator=collate).train()
    plan = memo_compile.plans()[-1]
    print(f"planned peak {plan.predicted_peak / 2**20:.1f} MiB of {plan.unplanned_peak / 2**20:.1f} MiB unplanned")
    print(f"for {plan.range or 'one length'}")
    return float(result.training_loss)


if __name__ == "__main__":
    main()
