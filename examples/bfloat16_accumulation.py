"""bfloat16 autocast, and gradients accumulated over micro-batches: a step's memory is that of one micro-batch.

python examples/bfloat16_accumulation.py
"""

from __future__ import annotations

import argparse

import torch

from memo_compile.models import Llama, LlamaConfig


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the mean loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="memo", help="memo, or memo_eager to debug")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro", type=int, default=4, help="micro-batches in a step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    a = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=256, layers=a.layers, width=a.width, heads=4, kv_heads=2))
    compiled = torch.compile(model, backend=a.backend, options={"memory_budget": "min"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(a.steps):
        total = 0.0
        for _ in range(a.micro):
            tokens = (torch.arange(a.tokens) * int(torch.randint(1, 8, ()))).unsqueeze(0) % 256
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = compiled(tokens, labels=tokens) / a.micro
            loss.backward()  # gradients add up; the arena of this micro-batch is free for the next
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        print(f"loss {total:.3f}")
    return losses


if __name__ == "__main__":
    main()
