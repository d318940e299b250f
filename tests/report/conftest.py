"""Dumps that several tests read: compiling is what takes time."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo

import memo_compile
from memo_compile.schema import Plan


@dataclass(frozen=True)
class Dumped:
    """The folder of one graph's dump, and the plan that its compilation recorded."""

    folder: Path
    plan: Plan


def dump(root, name, backend, budget):
    torch._dynamo.reset()
    model, x = zoo.make(name), zoo.batch(1)
    torch.compile(model, backend=backend, options={"memory_budget": budget, "dump": str(root)})(x, labels=x)
    (folder,) = root.iterdir()
    return Dumped(folder, memo_compile.plans()[-1])


@pytest.fixture(scope="session")
def inductor_dump(tmp_path_factory):
    """A small Llama in as little memory as can be, emitted by Inductor."""
    return dump(tmp_path_factory.mktemp("inductor"), "llama", "memo", "min")


@pytest.fixture(scope="session")
def eager_dump(tmp_path_factory):
    """A small GPT with dropout at 0.8 of its peak, run op by op."""
    return dump(tmp_path_factory.mktemp("eager"), "gpt-dropout", "memo_eager", 0.8)
