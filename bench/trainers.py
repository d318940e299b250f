"""Which trainers work with memo, in which settings: each row trains a tiny model in eager and with memo, and compares.

    python -m bench.trainers [--only "SFTTrainer, defaults" …] [--backend memo_eager] [--write]

A row works where memo planned something, no budget or limit was in the way, and losses are those of eager. With
`--write` each row goes to `docs/trainers.md` once it has run. What is not installed is not run, and told.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import memo_compile
from bench.common import ROOT
from memo_compile.models.hugging_face import hf_llama

PAGE = ROOT / "docs" / "trainers.md"
LENGTHS = (96, 60, 75, 41, 88, 52)  # of the examples, in turn
VOCABULARY = 64
TOLERANCE = 2e-3  # of the loss: float32, and other orders of sums
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "lightning", "torchao")

Compile = Callable[[nn.Module], None]
Train = Callable[[Compile], list[float]]


@dataclass(frozen=True)
class Row:
    """One line of the table. `needs` are distributions beside those that the tests need."""

    trainer: str
    setting: str
    train: Train
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.trainer}, {self.setting}"


@dataclass(frozen=True)
class Outcome:
    """What came of a row. `moved` are bytes that the plans offload or compute again."""

    steps: int
    plans: int
    moved: int
    difference: float
    seconds: float

    @property
    def works(self) -> bool:
        return self.steps > 0 and self.plans > 0 and self.moved > 0 and self.difference <= TOLERANCE


def run(row: Row, backend: str = "memo_eager") -> Outcome:
    """Train in eager and with memo from one seed."""
    started = time.perf_counter()
    want = _trained(row, lambda _: None)
    before = len(memo_compile.plans())
    options = {"memory_budget": "min"}
    got = _trained(row, lambda model: model.compile(backend=backend, options=options))
    plans = memo_compile.plans()[before:]
    moved = sum(p.offloaded_bytes + p.recomputed_bytes for p in plans)
    worst = max((abs(a - b) / max(abs(b), 1e-6) for a, b in zip(got, want, strict=True)), default=0.0)
    return Outcome(len(got), len(plans), moved, worst, time.perf_counter() - started)


def _trained(row: Row, compile_: Compile) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row.train(compile_)


def llama(layers: int = 2) -> Any:
    """Hugging Face's Llama, of two layers."""
    sizes: dict[str, Any] = {"vocab": VOCABULARY, "layers": layers, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 96}
    return hf_llama(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)


def examples(count: int = 6) -> list[dict[str, list[int]]]:
    """Rows of several lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest of the batch."""
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    columns = {key: [torch.as_tensor(row[key]) for row in rows] for key in fill}
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {key: pad(column, padding_value=fill[key]) for key, column in columns.items()}


@contextlib.contextmanager
def arguments(kind: Any, **more: Any) -> Iterator[Any]:
    """Arguments of Hugging Face's trainers, in a folder of their own."""
    plain = {
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        yield kind(output_dir=folder, **{**plain, **more})


def _losses(trainer: Any) -> list[float]:
    history = trainer.state.log_history
    return [float(entry[key]) for entry in history for key in ("loss", "eval_loss") if key in entry]


def plain(compile_: Compile) -> list[float]:
    """A loop of one's own."""
    model = llama()
    compile_(model)
    return _loop(model, torch.optim.AdamW(model.parameters(), 1e-3), lambda loss: loss.backward())


def _loop(model: nn.Module, optimizer: Any, backward: Callable[[torch.Tensor], None]) -> list[float]:
    losses = []
    for row in examples(4):
        loss = model(**collate([row])).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def accelerate(compile_: Compile) -> list[float]:
    """Accelerate, two calls a step."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama()
    compile_(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3))
    losses = []
    for row in examples(4):
        with accelerator.accumulate(model):
            loss = model(**collate([row])).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def hf(compile_: Compile, make: Callable[[], Any] = llama, **more: Any) -> list[float]:
    """Hugging Face's Trainer."""
    return _losses(hf_trained(compile_, make, **more))


def hf_trained(compile_: Compile, make: Callable[[], Any] = llama, **more: Any) -> Any:
    """The Trainer, after its last step."""
    from transformers import Trainer, TrainingArguments

    model = make()
    compile_(model)
    with arguments(TrainingArguments, **more) as given:
        trainer = Trainer(model, given, train_dataset=examples(), eval_dataset=examples(3), data_collator=collate)
        trainer.train()
    return trainer


def generating(compile_: Compile) -> list[float]:
    """Training, generation, training."""
    model = llama()
    compile_(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = _loop(model, optimizer, lambda loss: loss.backward())
    model.eval()
    made = model.generate(torch.tensor([[5, 9, 11]]), max_new_tokens=6, do_sample=False)
    model.train()
    return [*losses, float(made.sum()), *_loop(model, optimizer, lambda loss: loss.backward())]


def resuming(compile_: Compile) -> list[float]:
    """Saved after the second step, and gone on from there."""
    from transformers import Trainer, TrainingArguments

    losses: list[float] = []
    with arguments(TrainingArguments, save_strategy="steps", save_steps=2, max_steps=3) as given:
        for resume in (False, True):
            model = llama()
            compile_(model)
            trainer = Trainer(model, given, train_dataset=examples(), data_collator=collate)
            trainer.train(resume_from_checkpoint=f"{given.output_dir}/checkpoint-2" if resume else None)
            losses += _losses(trainer)
    return losses


def sft(compile_: Compile, **more: Any) -> list[float]:
    """TRL's SFTTrainer, of examples that are tokenized."""
    return _losses(sft_trained(compile_, **more))


def sft_trained(compile_: Compile, **more: Any) -> Any:
    """The SFTTrainer, after its last step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    model = llama()
    compile_(model)
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in examples(12)])
    with arguments(SFTConfig, bf16=False, **more) as given:
        trainer = SFTTrainer(model=model, args=given, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return trainer


def peft(compile_: Compile, config: Callable[[], Any]) -> list[float]:
    """Hugging Face's Trainer and an adapter of PEFT's."""
    from peft import get_peft_model

    return hf(compile_, lambda: get_peft_model(llama(), config()))


def _lora(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"], **more)


def _ia3() -> Any:
    from peft import IA3Config

    targets = ["k_proj", "v_proj", "down_proj"]
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=["down_proj"])


def _prompt() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def lightning(compile_: Compile) -> list[float]:
    """Lightning's Trainer."""
    import lightning

    losses: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()
            compile_(self.model)

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.model(**batch).loss
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    loader = torch.utils.data.DataLoader(examples(4), batch_size=1, collate_fn=collate)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=4, enable_model_summary=False, **quiet)
    trainer.fit(Module(), loader)
    return losses


def quantized(compile_: Compile, how: Callable[[nn.Module], None]) -> list[float]:
    """Frozen weights in few bits, adapters beside them."""
    from peft import get_peft_model

    def make() -> Any:
        model = get_peft_model(llama(), _lora())
        how(model)
        return model

    return hf(compile_, make)


def _int8(model: nn.Module) -> None:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    def is_base(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "base_layer" in name

    quantize_(model, int8_weight_only_quantized_training(), filter_fn=is_base)
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.requires_grad_(False)


def _nf4(model: nn.Module) -> None:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "base_layer" in name:
            module.weight = nn.Parameter(to_nf4(module.weight.detach(), 64, 4), requires_grad=False)


PEFT = ("peft",)
ROWS = (
    Row("plain loop", "lengths as they come", plain),
    Row("plain loop", "generation in between", generating),
    Row("Accelerate", "gradient accumulation", accelerate),
    Row("Trainer", "lengths as they come", hf),
    Row("Trainer", "batches of 2", partial(hf, per_device_train_batch_size=2)),
    Row("Trainer", "gradient_checkpointing=True", partial(hf, gradient_checkpointing=True)),
    Row("Trainer", "gradient accumulation", partial(hf, gradient_accumulation_steps=2)),
    Row("Trainer", "evaluation in between", partial(hf, eval_strategy="steps", eval_steps=1)),
    Row("Trainer", "save and resume", resuming),
    Row("SFTTrainer", "defaults", sft),
    Row("SFTTrainer", "gradient_checkpointing=False", partial(sft, gradient_checkpointing=False)),
    Row("SFTTrainer", "packing bfd", partial(sft, packing=True, max_length=128)),
    Row("SFTTrainer", "packing wrapped", partial(sft, packing=True, packing_strategy="wrapped", max_length=128)),
    Row("SFTTrainer", "padding-free", partial(sft, padding_free=True, max_length=None, per_device_train_batch_size=2)),
    Row("PEFT with Trainer", "LoRA", partial(peft, config=_lora), PEFT),
    Row("PEFT with Trainer", "DoRA", partial(peft, config=partial(_lora, use_dora=True)), PEFT),
    Row("PEFT with Trainer", "IA3", partial(peft, config=_ia3), PEFT),
    Row("PEFT with Trainer", "prompt tuning", partial(peft, config=_prompt), PEFT),
    Row("Lightning", "lengths as they come", lightning, ("lightning",)),
    Row("torchao and PEFT", "int8 weights", partial(quantized, how=_int8), ("torchao", "peft")),
    Row("torchao and PEFT", "NF4 weights", partial(quantized, how=_nf4), ("torchao", "peft")),
)


def version(name: str) -> str | None:
    """The version of what is installed; None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(row: Row) -> list[str]:
    """What a row needs and is not installed."""
    return [name for name in row.needs if version(name) is None]


def _line(row: Row, backend: str) -> str:
    if missing(row):
        return f"| {row.trainer} | {row.setting} | not run: {', '.join(missing(row))} not installed | | | |"
    try:
        found = run(row, backend)
    except Exception as error:  # it is what the table is to tell
        inner = getattr(error, "inner_exception", error)
        return f"| {row.trainer} | {row.setting} | no: {type(inner).__name__} | | | |"
    said = "yes" if found.works else "no"
    moved = f"{found.moved / 1024:.0f} KiB"
    return (
        f"| {row.trainer} | {row.setting} | {said} | {found.steps} | {found.plans} | {moved}, {found.difference:.0e} |"
    )


HEAD = """# Trainers and settings

Each row trained a Llama of two layers for a few steps with `model.compile(backend="{backend}",
options={{"memory_budget": "min"}})`, lengths as they come, and once in eager: it works where something was offloaded or
computed again and all losses are those of eager within 0.2 %. `make trainers` runs all of it and writes this page;
`make test` runs some of the rows.

{versions}

| trainer | setting | works | losses compared | plans | moved, largest difference |
|---|---|---|---|---|---|
"""


def told() -> dict[str, str]:
    """The rows that the page holds, by name."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| ")]
    return {", ".join(pair): line for pair, line in zip(cells, (x for x in lines if x.startswith("| ")), strict=True)}


def write(lines: dict[str, str], backend: str) -> None:
    """Write the page: rows in their order, those that were not run now as they stood there."""
    known = {**told(), **lines}
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES if version(name))
    table = [known[row.name] for row in ROWS if row.name in known]
    PAGE.write_text(HEAD.format(backend=backend, versions=versions) + "\n".join(table) + "\n")


def main() -> None:
    """Run rows, print the table, and write it where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--backend", default="memo_eager")
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    for row in ROWS:
        if not a.only or row.name in a.only:
            line = _line(row, a.backend)
            print(line, flush=True)
            if a.write:
                write({row.name: line}, a.backend)


if __name__ == "__main__":
    main()
