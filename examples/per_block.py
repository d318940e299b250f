"""One compiled block, called for each layer: compile time no longer grows with depth.

Each block is planned alone, so that its budget is for one block's forward and backward. Every call holds its own saved
activations: what a step holds is the blocks' kept bytes together.

    python examples/per_block.py
"""

from __future__ import annotations

import argparse

import torch

import memo_compile
from memo_compile.models import Llama, LlamaConfig


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="memo", help="memo, or memo_eager to debug")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    a = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=256, layers=a.layers, width=a.width, heads=4, kv_heads=2))
    for block in model.blocks:
        block.compile(backend=a.backend, options={"memory_budget": "min"})  # in place: names in checkpoints stay
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(a.steps):
        tokens = torch.arange(a.tokens).unsqueeze(0) % 256
        loss = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        print(f"loss {losses[-1]:.3f}")
    print(f"{len(memo_compile.plans())} plans for {a.layers} blocks")
    return losses


if __name__ == "__main__":
    main()
