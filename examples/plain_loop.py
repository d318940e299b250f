"""A plain training loop: the model compiled whole, the step as it always was.

python examples/plain_loop.py --budget 0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import memo_compile
from memo_compile.models import Llama, LlamaConfig


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="memo", help="memo, or memo_eager to debug")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the unplanned peak that the step may hold")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    a = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=256, layers=a.layers, width=a.width, heads=4, kv_heads=2))
    compiled = torch.compile(model, backend=a.backend, options={"memory_budget": a.budget})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes() * 100), dtype=torch.uint8).long()
    losses = []
    for _ in range(a.steps):
        start = int(torch.randint(0, len(text) - a.tokens, ()))
        tokens = text[start : start + a.tokens].unsqueeze(0)
        loss = compiled(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        print(f"loss {losses[-1]:.3f}")

    plan = memo_compile.plans()[-1]
    print(f"planned peak {plan.predicted_peak / 2**20:.1f} MiB of {plan.unplanned_peak / 2**20:.1f} MiB unplanned")
    return losses


if __name__ == "__main__":
    main()
