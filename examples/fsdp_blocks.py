"""FSDP2 with each block compiled alone: one compilation, one budget for all blocks.

torchrun --nproc-per-node 2 examples/fsdp_blocks.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import memo_compile
from memo_compile.models import Llama, LlamaConfig


def main(argv: list[str] | None = None) -> list[float]:
    """Train on this rank's sequences; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="memo", help="memo, or memo_eager to debug")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    a = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=256, layers=a.layers, width=a.width, heads=4, kv_heads=2)).to(device)
    for block in model.blocks:
        block.compile(backend=a.backend, options={"memory_budget": "min"})
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(a.steps):
        tokens = (torch.arange(a.tokens, device=device).unsqueeze(0) + dist.get_rank()) % 256
        loss = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    plan = memo_compile.plans()[-1]
    print(f"rank {dist.get_rank()}: loss {losses[-1]:.3f}, planned for {plan.calls} calls of one block")
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
