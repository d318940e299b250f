"""Costs against FLOP counts worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from memo_compile.forecast.presets import build, fake_tensors
from memo_compile.hardware.profiles import PROFILES
from memo_compile.models import GPTConfig, LlamaConfig
from memo_compile.models.gpt import Block as GPTBlock
from memo_compile.models.llama import Block as LlamaBlock
from memo_compile.models.llama import rotary_tables
from memo_compile.passes.analysis.costs import KernelTimer, account, graph_costs, is_attention, node_cost, total
from memo_compile.trace.offline import trace

A800 = PROFILES["a800-80gb"]
S, H, HEADS, KV_HEADS, FFN = 512, 256, 8, 2, 688


def graph_of(fn, *args):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(fn, tracing_mode="fake")(*args)


def costs_of(fn, *args):
    return {str(n.target): node_cost(n, A800) for n in graph_of(fn, *args).graph.nodes if n.op == "call_function"}


def flops_of(block, *args):
    """Of a block's forward and backward, apart."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, *args):
            return self.block(*args).sum()

    x = torch.zeros(1, S, H, requires_grad=True)
    p, _ = trace(Step(), (x, *args), {}, {"hardware": "a800"})
    forward, backward = (
        sum(p.flops.get(n.name, 0) for n in g.graph.nodes if n.op == "call_function") for g in (p.forward, p.backward)
    )
    return forward, backward


# One layer, by hand. A matmul of (m, k) and (k, n) is 2·m·k·n, and its backward makes two of that size. Attention
# makes two matmuls of 2·S·S·H forward and five backward, and causally half of them: 2·S·S·H and 5·S·S·H.


def test_a_layer_of_the_papers_gpt():
    block = GPTBlock(GPTConfig(layers=1, width=H, heads=HEADS))
    forward, backward = flops_of(block)
    matmuls = 2 * S * (3 * H * H + H * H + 4 * H * H + 4 * H * H)  # qkv, out, wide, narrow: 24·S·H²
    assert matmuls == 24 * S * H**2
    assert forward == matmuls + 2 * S * S * H
    assert backward == 2 * matmuls + 5 * S * S * H


def test_a_layer_of_llama_with_grouped_queries():
    config = LlamaConfig(layers=1, width=H, heads=HEADS, kv_heads=KV_HEADS, ffn=FFN)
    forward, backward = flops_of(LlamaBlock(config), *rotary_tables(S, H // HEADS, 1e4, torch.zeros(())))
    shared = H * KV_HEADS // HEADS
    matmuls = 2 * S * (2 * H * H + 2 * H * shared + 3 * H * FFN)  # q and out, k and v, gate and up and down
    assert forward == matmuls + 2 * S * S * H
    assert backward == 2 * matmuls + 5 * S * S * H


def test_a_rank_does_its_share_and_pays_for_its_collectives():
    width, tokens, ranks = 4096, 8192, 8
    joints = [trace(b.model, b.args, b.kwargs, {"hardware": "a800"})[0].joint for b in shares(tokens, ranks)]
    one, two = (total(graph_costs(j, A800, fused=True).values()) for j in joints)
    layer = 3 * 24 * tokens * width**2 + 7 * tokens**2 * width
    assert two.flops - one.flops == layer / ranks
    # A layer gathers four times and scatters four times, and gathers its two saved inputs once more: bfloat16.
    assert two.link_bytes - one.link_bytes == 10 * 2 * tokens * width * (ranks - 1) / ranks


def shares(tokens, ranks):
    return [build("gpt-7b", tokens, ranks=ranks, layers=layers) for layers in (1, 2)]


def test_the_account_by_op_adds_up():
    block = GPTBlock(GPTConfig(layers=1, width=H, heads=HEADS))
    gm = trace(block, (torch.zeros(1, 64, H, requires_grad=True),), {}, {"hardware": "a800"})[0].joint
    for fused in (False, True):
        costs = graph_costs(gm, A800, fused=fused)
        by_op = account(gm, costs)
        whole = total(costs.values())
        for part in ("flops", "bytes", "seconds"):
            assert sum(getattr(c, part) for c in by_op.values()) == pytest.approx(getattr(whole, part))
        assert next(iter(by_op.values())).seconds == max(c.seconds for c in by_op.values())


def test_a_matmul_costs_two_flops_for_each_multiplication():
    cost = costs_of(torch.mm, torch.ones(8, 16), torch.ones(16, 32))["aten.mm.default"]
    assert cost.flops == 2 * 8 * 16 * 32
    assert cost.bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)


def test_large_matmuls_reach_the_profiles_share_of_the_peak():
    with fake_tensors(torch.bfloat16):
        n = 16384
        gm = graph_of(torch.mm, torch.ones(n, n), torch.ones(n, n))
    (cost,) = graph_costs(gm, A800).values()
    assert cost.seconds == pytest.approx(2 * n**3 / (0.859 * 312e12), rel=1e-3)


def test_a_compiler_fuses_elementwise_ops():
    gm = graph_of(lambda x: torch.exp(x + 1).relu() * 2, torch.zeros(1 << 20))
    alone, fused = (total(graph_costs(gm, A800, fused=f).values()) for f in (False, True))
    assert alone.bytes == 4 * 2 * 4 * 2**20
    assert fused.bytes == 2 * 4 * 2**20


def test_views_cost_nothing():
    assert costs_of(lambda x: x.view(4, 2), torch.ones(8))["aten.view.default"].seconds == 0


# Attention, as each kernel of torch's calls it: (heads and tokens of the inputs, arguments by name).

HEADED = (2, 4, 64, 32)
TOKENS_FIRST = (2, 64, 4, 32)
ONE = 2.0 * 2 * 4 * 64 * 64 * 32


def attention_node(op, shape, **given):
    """A call of `op` as it would stand in a graph, of which nothing but the arguments is looked at."""
    graph = torch.fx.Graph()
    arguments = []
    for argument in op._schema.arguments:
        if argument.kwarg_only or argument.name in given:
            arguments.append(given.get(argument.name))
        elif isinstance(argument.type, torch.TensorType):
            node = graph.placeholder(argument.name)
            node.meta["val"] = torch.zeros(shape, device="meta", dtype=torch.bfloat16)
            arguments.append(node)
        else:
            arguments.append(argument.default_value)
    positional = [a for a, d in zip(arguments, op._schema.arguments, strict=True) if not d.kwarg_only]
    node = graph.call_function(op, tuple(positional))
    node.meta["val"] = torch.zeros(shape, device="meta", dtype=torch.bfloat16)
    return node


aten = torch.ops.aten
HEADED_OPS = [
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_fused_attention_overrideable,
]


@pytest.mark.parametrize("op", HEADED_OPS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_fused_attention_is_counted_causally_where_it_is_causal(op, causal):
    forward = attention_node(op.default, HEADED, is_causal=causal)
    backward = attention_node(getattr(aten, f"{op.__name__}_backward").default, HEADED, is_causal=causal)
    share = 0.5 if causal else 1.0
    assert is_attention(forward)
    assert node_cost(forward, A800).flops == 2 * ONE * share
    assert node_cost(backward, A800).flops == 5 * ONE * share


@pytest.mark.parametrize(
    ("op", "argument", "values"),
    [
        (aten._flash_attention_forward, "is_causal", (False, True)),
        (aten._efficient_attention_forward, "custom_mask_type", (0, 1)),
    ],
    ids=["flash", "efficient"],
)
def test_kernels_with_tokens_before_heads(op, argument, values):
    full, causal = (node_cost(attention_node(op.default, TOKENS_FIRST, **{argument: v}), A800).flops for v in values)
    assert (full, causal) == (2 * ONE, ONE)


def test_a_mask_saves_no_matmuls():
    def attend(q, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q, mask = torch.ones(1, 4, 64, 8), torch.ones(64, 64, dtype=torch.bool).tril()
    found = [c.flops for c in costs_of(attend, q, mask).values() if c.flops]
    assert sum(found) == 2 * 2 * 4 * 64 * 64 * 8


def test_kernels_can_be_measured():
    gm = graph_of(lambda a, b: (a @ b).relu() @ b, torch.zeros(64, 64), torch.zeros(64, 64))
    timer = KernelTimer("cpu")
    costs = graph_costs(gm, PROFILES["cpu"], timer=timer)
    first, second = (costs[n.name] for n in gm.graph.nodes if "mm" in str(n.target))
    assert 0 < first.seconds < 1
    assert first.seconds == second.seconds  # one shape, timed once
    assert len(timer.known) == 1
    assert KernelTimer("cpu", largest=16)(next(n for n in gm.graph.nodes if "mm" in str(n.target))) is None


def test_matmuls_are_priced_by_their_smallest_dimension_and_attention_by_its_heads():
    """A class that is a tenth as fast makes the op ten times as long, and no other."""
    slow, fast = ((1e3, 0.05),), ((1e3, 0.5),)
    profile = replace(
        A800,
        memory_bandwidth=1e30,
        launch_overhead=0.0,
        matmuls_by_rows=((8.0, slow), (64.0, fast)),
        attention_by_heads=((2.0, slow), (8.0, fast)),
    )

    def rate(fn, *shapes):
        nodes = graph_of(fn, *(torch.zeros(shape) for shape in shapes)).graph.nodes
        cost = total(node_cost(n, profile) for n in nodes if n.op == "call_function")
        return cost.flops / cost.seconds / profile.flops("float32")

    assert rate(torch.mm, (512, 64), (64, 512)) == pytest.approx(0.5)
    for thin in (((8, 256), (256, 512)), ((256, 8), (8, 512)), ((512, 256), (256, 8))):
        assert rate(torch.mm, *thin) == pytest.approx(0.05)
    assert rate(torch.addmm, (512,), (8, 256), (256, 512)) == pytest.approx(0.05)
    assert rate(torch.bmm, (4, 8, 64), (4, 64, 512)) == pytest.approx(0.05)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert rate(attend, *[(1, 8, 64, 16)] * 3) == pytest.approx(0.5)
    assert rate(attend, *[(1, 2, 64, 16)] * 3) == pytest.approx(0.05)
    assert rate(attend, *[(4, 2, 64, 16)] * 3) == pytest.approx(0.5)
