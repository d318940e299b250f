"""Attentions whose mask is always causal read none, and make what they made with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import memo_compile
from memo_compile.passes.fx.facts import argument
from memo_compile.passes.transforms.causal_masks import say_causal
from memo_compile.passes.transforms.masks import mask_of

ROWS = 40


def seen(rows=ROWS):
    at = torch.arange(rows)
    return at[None, :] <= at[:, None]


def step(mask, rows=ROWS, **options):
    """Attention with a mask, and its gradients."""

    def run(q, k, v):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask(), **options)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    return run


def traced(fn, tensors):
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*tensors)


def given(keys=ROWS):
    torch.manual_seed(0)
    return [torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (ROWS, keys, keys)]


def attentions(gm):
    return [n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target)]


@pytest.mark.parametrize(
    ("mask", "causal"),
    [(seen, True), (lambda: torch.ones(ROWS, ROWS, dtype=torch.bool), False)],
    ids=["causal", "nothing hidden"],
)
def test_an_attention_reads_no_mask_that_is_known(mask, causal):
    tensors = given()
    gm = traced(step(mask, scale=0.3), tensors)
    wanted = gm(*tensors)
    assert all(map(mask_of, attentions(gm)))
    forward, backward = attentions(say_causal(gm))
    for node in (forward, backward):
        assert mask_of(node) is None
        assert argument(node, "is_causal") is causal
        assert argument(node, "scale") == 0.3
    torch.testing.assert_close(gm(*tensors), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "keys"),
    [
        (lambda: seen() & (torch.arange(ROWS) % 7 != 3), ROWS),
        (lambda: seen().mT, ROWS),
        (lambda: seen(2 * ROWS)[:ROWS], 2 * ROWS),
    ],
    ids=["some keys hidden", "earlier keys hidden", "more keys than queries"],
)
def test_another_mask_is_read(mask, keys):
    tensors = given(keys)
    gm = say_causal(traced(step(mask), tensors))
    assert all(map(mask_of, attentions(gm)))


@pytest.mark.parametrize("kind", ["efficient", "cudnn"])
def test_arguments_of_other_kernels_are_found_by_name(kind):
    target = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention").default
    gm = traced(step(seen), given())
    forward, _ = attentions(gm)
    mask, (q, k, v) = mask_of(forward), forward.args[:3]
    with gm.graph.inserting_before(forward):
        node = gm.graph.call_function(target, (q, k, v, mask, True), {"scale": 0.5})
    say_causal(gm)
    assert node.args == (q, k, v, None, True, 0.0, True)
    assert node.kwargs == {"scale": 0.5}


class Masked(nn.Module):
    """A layer whose mask is made of positions, as Hugging Face's are."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = seen(x.shape[1])[None, None].expand(x.shape[0], 1, -1, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend", ["memo", "memo_eager"])
def test_a_step_holds_no_mask(backend):
    """It has more bytes here than everything else, the kernel's own among it."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Masked().double(), torch.randn(1, 512, 16, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend, options={"memory_budget": "min"})
    wanted = torch.autograd.grad(model(x).square().sum(), model.parameters())
    compiled(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    torch.testing.assert_close(found, list(wanted), rtol=1e-10, atol=1e-12)
    model.zero_grad()
    assert memo_compile.measure_peak(lambda: compiled(x).square().sum().backward()) < 512 * 512 * 8
