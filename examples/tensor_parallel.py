"""DTensor's tensor parallelism: the ranks agree on one plan for the graph that holds their collectives.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import memo_compile


class MLP(nn.Module):
    """A gated MLP after a norm, added to the residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up, self.down = (
            nn.Linear(width, 4 * width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        y = self.norm(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


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
    torch.manual_seed(0)
    model = nn.Sequential(*(MLP(a.width) for _ in range(a.layers))).to(device)
    for layer in model:
        parallelize_module(layer, mesh, {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()})
    compiled = torch.compile(model, backend=a.backend, options={"memory_budget": "min"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(1, a.tokens, a.width, device=device)
    losses = []
    for _ in range(a.steps):
        loss = (compiled(x) - 1).square().mean()
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
