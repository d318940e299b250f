"""Hugging Face's Trainer on two ranks: it wraps the model in DDP, and the weights become those of its eager run.

Accelerate has FSDP on accelerators alone: blocks that are sharded and compiled are in `test_modes.py`.
"""

import pytest
import torch
import zoo
from ranks import Ranks

import memo_compile

STEPS, TOKENS = 3, 96
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    both = Ranks(tmp_path_factory.mktemp("ranks"))
    yield both
    both.stop()


def trained(folder, options):
    """The weights after a few steps, compiled where there are options."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = memo_compile.loss_only(zoo.hf_llama()).double()
    if options is not None:
        model.compile(backend="memo_eager", options=options)
    rows = torch.randint(0, 64, (2 * STEPS, TOKENS), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        optim="sgd",
        learning_rate=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def both_ways(rank, folder):
    from transformers.utils import logging

    logging.set_verbosity_error()
    expected = trained(folder, None)
    got = trained(folder, {"memory_budget": "min"})
    (plan,) = memo_compile.plans()
    off = max(float((got[n] - expected[n]).norm() / expected[n].norm()) for n in expected)
    return off, plan.offloaded_bytes + plan.recomputed_bytes, got["lm_head.weight"]


def test_data_parallel_weights_are_those_of_eager_mode(ranks, tmp_path):
    first, second = ranks.run(both_ways, str(tmp_path))
    for off, saved, _ in (first, second):
        assert off <= 1e-12
        assert saved > 0
    assert torch.equal(first[2], second[2])
