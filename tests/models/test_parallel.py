"""Tensor parallelism: the shares of all ranks make up the whole model, values and gradients."""

import torch
import torch.multiprocessing as mp

from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig, Shard

RANKS = 2
TOKENS = 16
SIZES = {"vocab": 64, "layers": 2, "width": 32, "heads": 4}


def build(family, shard):
    if family == "gpt":
        return GPT(GPTConfig(**SIZES, tokens=0, shard=shard)).double()
    return Llama(LlamaConfig(**SIZES, kv_heads=2, ffn=96, shard=shard)).double()


def share_of(name, whole, like, rank):
    """Rank `rank`'s share of a weight: rows or columns, of q, k and v each where they lie in one weight."""
    if whole.shape == like.shape:
        return whole
    dim = next(d for d in range(whole.dim()) if whole.shape[d] != like.shape[d])
    parts = 3 if "qkv" in name else 1
    return torch.cat([part.chunk(RANKS, dim)[rank] for part in whole.chunk(parts, dim)], dim)


def compare(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for family in ("gpt", "llama"):
        results[rank, family] = worst_difference(family, rank)
    torch.distributed.barrier()  # gloo ends a process whose peer has closed the connection first
    torch.distributed.destroy_process_group()


def worst_difference(family, rank):
    """Between this rank's loss and gradients and its share of those of the whole model."""
    torch.manual_seed(0)
    whole, own = build(family, Shard()), build(family, Shard(RANKS, rank))
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for p in weights.values():
            p.uniform_(-0.5, 0.5)
        for name, p in own.named_parameters():
            p.copy_(share_of(name, weights[name], p, rank))
    tokens = torch.randint(0, 64, (1, TOKENS))
    expected = whole(tokens, labels=tokens)
    expected.backward()
    mine = tokens.chunk(RANKS, 1)[rank]
    loss = own(mine, labels=mine)
    loss.backward()
    worst = float((loss - expected).abs())
    for name, p in own.named_parameters():
        wanted = share_of(name, weights[name].grad, p, rank)
        if p.shape == weights[name].shape:  # held by every rank: the sum over their tokens
            torch.distributed.all_reduce(p.grad)
        worst = max(worst, float((p.grad - wanted).abs().max()))
    return worst


def test_the_shares_make_up_the_whole_model(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(compare, (tmp_path / "store", results), nprocs=RANKS)
        assert len(results) == 2 * RANKS
        assert max(results.values()) < 1e-6  # logits are summed up in float32
