"""One long sequence on several devices: each holds its part of the tokens of a model that knows nothing of it.

torchrun --nproc-per-node 2 examples/sequence_parallel.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import memo_compile
from memo_compile.models import Llama, LlamaConfig


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the losses, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="memo", help="memo, or memo_eager to debug")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    a = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)  # parameters and data are the same on all ranks
    config = LlamaConfig(vocab=512, layers=a.layers, width=a.width, heads=4, kv_heads=2, ffn=3 * a.width)
    model = memo_compile.sequence_parallel(
        Llama(config).to(device), mesh, options={"memory_budget": "min"}, backend=a.backend
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(0, 512, (1, a.tokens), device=device)
    losses = []
    for _ in range(a.steps):
        loss = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    plan = memo_compile.plans()[-1]
    print(f"rank {dist.get_rank()}: loss {losses[-1]:.3f}, peak {plan.predicted_peak / 2**20:.1f} MiB planned")
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
