"""What "auto" leaves room for: the whole model's gradients and moments, and what an engine gathers."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from memo_compile.options import Options
from memo_compile.trace import setting, siblings
from memo_compile.trace.setting import BYTES_PER_TRAINABLE, auto_budget, setting_for
from memo_compile.trace.to_come import engine_bytes, trainable_elements

RANKS, WIDTH = 4, 8
BLOCK, ENDS = 4 * WIDTH * WIDTH, 4 * 3 * WIDTH  # bytes of one block, and of what belongs to no block
GPU = torch.device("cuda", 0)


@contextlib.contextmanager
def ranks():
    """As on one of several ranks that never answer."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (RANKS,))
    finally:
        dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.ends = nn.Linear(WIDTH, 3, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(blocks))


def sharded(mesh, blocks):
    model = Model(blocks)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_an_engine_gathers_two_blocks_and_scatters_the_gradients_of_one():
    with ranks() as mesh:
        assert engine_bytes(sharded(mesh, 3)) == 2 * BLOCK + BLOCK
        assert engine_bytes(sharded(mesh, 1)) == BLOCK + ENDS + BLOCK


def test_without_an_engine_nothing_is_gathered():
    assert engine_bytes(Model(3)) == 0


def test_of_sharded_parameters_a_rank_trains_its_shard():
    whole = Model(3)
    assert trainable_elements(whole) == (3 * BLOCK + ENDS) // 4
    whole.ends.weight.requires_grad_(False)
    assert trainable_elements(whole) == 3 * BLOCK // 4
    with ranks() as mesh:
        assert trainable_elements(sharded(mesh, 3)) == 3 * BLOCK // 4 // RANKS + WIDTH  # 3 rows: one for each rank


@pytest.mark.parametrize("budget", ["auto", 2**30])
def test_a_block_that_is_compiled_alone_counts_the_whole_model_for_auto(monkeypatch, budget):
    model = Model(3)
    monkeypatch.setattr(setting, "device_of", lambda inputs: GPU)
    monkeypatch.setattr(siblings, "compiled_module", lambda: model.blocks[0])
    inputs = [torch.ones(2, WIDTH), *model.blocks[0].parameters()]
    made = setting_for(Options(memory_budget=budget, hardware="h200", calls=3), inputs)
    assert made.trainable == (trainable_elements(model) if budget == "auto" else BLOCK // 4)


def test_auto_leaves_what_an_engine_takes_unless_a_reserve_is_given():
    assert auto_budget(1000, None, trainable=10, engine=100) == 950 - 10 * BYTES_PER_TRAINABLE - 100
    assert auto_budget(1000, 150, trainable=10, engine=100) == 800
