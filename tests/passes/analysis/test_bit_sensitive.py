"""What something hangs on by its last bits is not recomputed."""

import pytest
import torch
from torch import nn

import memo_compile

AGAIN = {"memory_budget": "min", "offload": False, "token_slice": 7}


def greatest(h):
    """Its gradient goes to where `h` is its maximum."""
    return torch.sin(h) * h.amax(-1, keepdim=True)


def where_it_is_greatest(h):
    m = h.detach().amax(-1, keepdim=True)
    return torch.sin(h) * ((h == m).to(h.dtype) + 0.5) * m


def the_best_two(h):
    _, places = h.topk(2, -1)
    return torch.sin(h) * torch.zeros_like(h).scatter(1, places, 2.0).add(0.5)


def rounded(h):
    return torch.sin(h) * (1024 * h).round()


def truncated(h):
    return torch.sin(h) * (1024 * h).long()


def by_a_constant(h):
    """What is truncated is made of no data: it is the same again."""
    return torch.sin(h) * (torch.arange(h.shape[-1], dtype=h.dtype) / 3).long()


def where_it_differs(h):
    return torch.sin(h) * (torch.sign(h - h.amax(-1, keepdim=True)) + 0.5)


def above_the_greatest(h):
    return torch.sin(h) * (torch.relu(h - h.amax(-1, keepdim=True) + 1e-300) + 1) + torch.abs(h - h.detach())


def rectified(h):
    return torch.sin(h) * torch.relu(h)


def smooth(h):
    return torch.sin(h) * h.tanh()


def trained(layer, wrap):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3)).double()

    def model(x):
        for block in blocks:
            x = layer(block(x))
        return x.square().mean()

    wrap(model)(torch.randn(1024, 32, dtype=torch.float64)).backward()
    return [p.grad for p in blocks.parameters()]


def matmuls_of(layer):
    """The saved matmuls of the least plan that offloads nothing, checked against eager."""
    got = trained(layer, lambda model: torch.compile(model, backend="memo_eager", options=AGAIN))
    for gradient, want in zip(got, trained(layer, lambda model: model), strict=True):
        assert (gradient - want).norm() <= 1e-10 * want.norm()
    return [a for a in memo_compile.plans()[-1].activations if a.name.startswith("addmm")]


@pytest.mark.parametrize(
    "layer", [greatest, where_it_is_greatest, rounded, truncated, where_it_differs, above_the_greatest]
)
def test_what_decides_is_not_made_again(layer):
    assert not any(a.recomputed for a in matmuls_of(layer))


@pytest.mark.parametrize("layer", [smooth, rectified, the_best_two, by_a_constant])
def test_where_nothing_is_decided_once_more_it_may_be_made_again(layer):
    """Places that were chosen in the forward are saved."""
    assert any(a.recomputed for a in matmuls_of(layer))
