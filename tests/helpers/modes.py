"""A tiny Llama for two ranks, and its gradients beside those of one process. Each rank has a sequence of its own."""

import torch
import torch.distributed as dist
from torch import nn

import memo_compile
from memo_compile.models import Llama, LlamaConfig

TOKENS, VOCAB = 256, 64


def llama(layers=2):
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab=VOCAB, layers=layers, width=32, heads=4, kv_heads=2, ffn=96)).double()


def batch():
    """Tokens of both ranks."""
    return torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def wanted(layers=2):
    """Gradients of one process, by name."""
    model, ids = llama(layers), batch()
    model(ids, labels=ids).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def worst(model, expected):
    """The largest relative difference of a gradient."""
    gradients = {n.replace("module.", "").replace("_orig_mod.", ""): whole(p.grad) for n, p in model.named_parameters()}
    assert gradients.keys() == expected.keys(), sorted(gradients)[:4]
    return max(float((gradients[n] - g).norm() / g.norm()) for n, g in expected.items())


def two_steps(model, rank):
    """Two steps on this rank's sequence; returns the bytes that the second one held at most."""
    ids = batch()[rank : rank + 1]

    def step():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids).backward()

    step()
    model.zero_grad(set_to_none=True)
    held = memo_compile.measure_peak(step)
    dist.barrier()
    return held


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(32), MLP()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Mixer(nn.Module):
    """Layers for tensor parallelism, with one loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()
