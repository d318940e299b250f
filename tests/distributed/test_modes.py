"""The ways in which people train on several devices, each with two ranks: gradients are those of one process.

Each rank has a sequence of its own, or its part of what both compute. What a step holds is measured on each rank.
"""

import pytest
import torch
import torch.distributed as dist
from modes import TOKENS, Mixer, llama, two_steps, wanted, worst
from ranks import Ranks
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.nn import functional as F

import memo_compile
from memo_compile.models.llama import rotary_tables

MIN = {"memory_budget": "min"}
EXACT = 1e-12  # of a gradient in float64
BOTH = ["memo_eager", "memo"]
EITHER = ["memo_eager", pytest.param("memo", marks=pytest.mark.grid)]  # what compiles longest


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    both = Ranks(tmp_path_factory.mktemp("ranks"))
    yield both
    both.stop()


def check(said, *, error=EXACT, share=1.0):
    """Each rank's worst gradient, what it held, and what it holds in eager; and that something was planned."""
    for off, held, eager, saved in said:
        assert off <= error
        assert held <= share * eager
        assert saved > 0


def outcome(model, expected, held, eager):
    plans = memo_compile.plans()
    return worst(model, expected), held, eager, sum(p.offloaded_bytes + p.recomputed_bytes for p in plans)


def data_parallel(rank, backend, order, options):
    from torch.nn.parallel import DistributedDataParallel as Parallel

    dist._DEFAULT_FIRST_BUCKET_BYTES = 16 * 1024  # the model has several buckets, at which torch would cut
    eager = two_steps(Parallel(llama(), bucket_cap_mb=0.1), rank)
    model = llama()
    if order == "before":
        model.compile(backend=backend, options=options)
    run = Parallel(model, bucket_cap_mb=0.1)
    if order == "after":
        run = torch.compile(run, backend=backend, options=options)
    held = two_steps(run, rank)
    return *outcome(model, wanted(), held, eager), len(memo_compile.plans())


@pytest.mark.parametrize(
    ("backend", "order"), [("memo_eager", "after"), pytest.param("memo", "before", marks=pytest.mark.grid)]
)
def test_data_parallel_under_a_budget_is_one_graph(ranks, backend, order):
    said = ranks.run(data_parallel, backend, order, MIN)
    check([s[:-1] for s in said], share=0.8)
    assert [s[-1] for s in said] == [1, 1]


def sharded(rank, backend, order, reshard, policy):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    policies = {
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(torch.float32, torch.float64)},
        "on the host": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    settings = {"mesh": init_device_mesh("cpu", (2,)), "reshard_after_forward": reshard, **policies.get(policy, {})}

    def shard(model):
        for part in (*model.blocks, model):
            fully_shard(part, **settings)
        return model

    eager = two_steps(shard(llama()), rank)
    model = llama()
    for block in model.blocks if order == "compiled first" else ():
        block.compile(backend=backend, options=MIN)
    run = shard(model)
    for block in model.blocks if order == "sharded first" else ():
        block.compile(backend=backend, options=MIN)
    if order == "whole":  # Dynamo leaves the graph at each hook
        run = torch.compile(model, backend=backend, options=MIN)
    held = two_steps(run, rank)
    return *outcome(model, wanted(), held, eager), max(plan.calls for plan in memo_compile.plans())


@pytest.mark.parametrize(
    ("backend", "order", "reshard", "policy"),
    [
        ("memo_eager", "compiled first", True, None),
        ("memo_eager", "compiled first", False, "mixed precision"),
        ("memo_eager", "sharded first", True, "on the host"),
        pytest.param("memo", "sharded first", True, None, marks=pytest.mark.grid),
    ],
)
def test_fully_sharded_blocks_are_one_compilation_that_counts_them_all(ranks, backend, order, reshard, policy):
    said = ranks.run(sharded, backend, order, reshard, policy)
    check([s[:-1] for s in said], error=1e-5 if policy == "mixed precision" else EXACT)
    assert [s[-1] for s in said] == [2, 2]


def test_a_fully_sharded_model_that_is_compiled_whole(ranks):
    check([s[:-1] for s in ranks.run(sharded, "memo_eager", "whole", True, None)])


def tensor_parallel(rank, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
    from torch.distributed.tensor.placement_types import Replicate, Shard

    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = Mixer()
    reference(x).backward()

    def parallel():
        model = Mixer()
        for layer in model.layers:
            plan = {
                "norm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "mlp.gate": ColwiseParallel(),
                "mlp.up": ColwiseParallel(),
                "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            }
            parallelize_module(layer, mesh, plan)
        return model

    def step(run):
        return lambda: (run(x.chunk(2, 1)[rank]) / 2).backward()

    plain = parallel()
    step(plain)()
    eager = memo_compile.measure_peak(step(plain))
    model = parallel()
    run = torch.compile(model, backend=backend, options=MIN)
    step(run)()
    model.zero_grad(set_to_none=True)
    held = memo_compile.measure_peak(step(run))
    return outcome(model, {n: p.grad for n, p in reference.named_parameters()}, held, eager)


@pytest.mark.parametrize("backend", BOTH)
def test_tensor_parallel_with_sequence_parallel_norms(ranks, backend):
    check(ranks.run(tensor_parallel, backend))


class Gathered(nn.Module):
    """Layers whose weights are gathered in the graph, and their gradients scattered."""

    def __init__(self, weights, rank):
        super().__init__()
        self.shards = nn.ParameterList(w.chunk(2)[rank].clone() for w in weights)

    def forward(self, x):
        for shard in self.shards:
            weight = functional.all_gather_tensor_autograd(shard, 0, dist.group.WORLD)
            x = torch.sin(F.linear(x, weight)) + x
        return x.square().mean() / 2  # of two ranks


def gathered(rank, backend, lengths):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(256, 256, generator=generator, dtype=torch.float64) / 16 for _ in range(4)]
    data = torch.randn(2, max(lengths), 256, generator=generator, dtype=torch.float64)
    leaves = [w.clone().requires_grad_() for w in weights]
    model = Gathered(weights, rank)
    run = torch.compile(model, backend=backend, options={**MIN, "offload": False})
    for n in lengths:
        x = data[:, :n]
        for w in leaves:
            x = torch.sin(F.linear(x, w)) + x
        x.square().mean().backward()
        run(data[rank, :n]).backward()
    off = max(
        float((p.grad - w.grad.chunk(2)[rank]).norm() / w.grad.norm())
        for p, w in zip(model.shards, leaves, strict=True)
    )
    plans = memo_compile.plans()
    return off, [[a.name for a in p.activations if a.recomputed and a.shape == (256, 256)] for p in plans], plans


@pytest.mark.parametrize("backend", BOTH)
def test_parameters_gathered_in_the_graph_are_gathered_again_on_every_rank(ranks, backend):
    (first, (again,), _), (second, (there,), _) = ranks.run(gathered, backend, (64,))
    assert max(first, second) <= EXACT
    assert again == there != []


@pytest.mark.parametrize("backend", EITHER)
def test_ranks_plan_one_range_of_lengths_together(ranks, backend):
    (first, (_, again), (_, plan)), (second, (_, there), _) = ranks.run(gathered, backend, (64, 48, 36, 60))
    assert max(first, second) <= EXACT
    assert again == there != []
    assert plan.range.endswith("64]")


class Ulysses(nn.Module):
    """Attention over token shards: tokens for heads, and back."""

    def __init__(self, ranks):
        super().__init__()
        torch.manual_seed(0)
        self.ranks = ranks
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)
        self.double()

    def swap(self, x, to_heads):
        """(tokens / ranks, heads, size) to (tokens, heads / ranks, size), or back."""
        rows, heads, size = x.shape
        if self.ranks == 1:
            return x
        if to_heads:
            x = x.view(rows, self.ranks, heads // self.ranks, size).transpose(0, 1).contiguous()
        else:
            x = x.contiguous()
        x = functional.all_to_all_single_autograd(x.view(-1), None, None, dist.group.WORLD)
        if to_heads:
            return x.view(rows * self.ranks, heads // self.ranks, size)
        return x.view(self.ranks, rows // self.ranks, heads, size).transpose(0, 1).reshape(rows // self.ranks, -1, size)

    def forward(self, x):
        q, k, v = (self.swap(part.view(-1, 4, 8), True).transpose(0, 1) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        return (x + self.out(self.swap(mixed.transpose(0, 1), False).reshape(-1, 32))).square().sum()


def ulysses(rank, backend):
    x = torch.randn(2 * TOKENS, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference, model = Ulysses(1), Ulysses(2)
    reference(x).backward()
    run = torch.compile(model, backend=backend, options=MIN)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        run(x.chunk(2)[rank].contiguous()).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    return worst(model, {n: p.grad for n, p in reference.named_parameters()})


@pytest.mark.parametrize("backend", BOTH)
def test_attention_between_two_all_to_alls(ranks, backend):
    assert max(ranks.run(ulysses, backend)) <= EXACT


def pipeline(rank, backend):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    class Stage(nn.Module):
        def __init__(self, block, tables):
            super().__init__()
            self.block, self.tables = block, tables

        def forward(self, x):
            return self.block(x, *self.tables)

    model = llama()
    tables = rotary_tables(TOKENS, 8, 10000.0, model.norm.weight)
    x = torch.randn(4, TOKENS, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x
    for block in model.blocks:
        y = block(y, *tables)
    y.square().mean().backward()
    expected = {n: p.grad for n, p in model.blocks[rank].named_parameters()}
    mine = llama().blocks[rank]
    mine.compile(backend=backend, options=MIN)
    stage = PipelineStage(Stage(mine, tables), rank, 2, torch.device("cpu"), input_args=(x[:1],))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=lambda out, _: out.square().mean())
    for _ in range(2):
        mine.zero_grad(set_to_none=True)
        schedule.step(*([x] if rank == 0 else []), **({} if rank == 0 else {"target": x}))
    return worst(mine, expected), memo_compile.plans()[-1].calls


@pytest.mark.parametrize("backend", EITHER)
def test_stages_of_a_pipeline_learn_how_many_microbatches_wait(ranks, backend):
    (first, calls), (second, one) = ranks.run(pipeline, backend)
    assert max(first, second) <= EXACT
    assert (calls, one) == (2, 1)
