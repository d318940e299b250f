"""Costs against FLOP counts worked out by hand."""

import torch

from memo_compile.cost import node_cost
from memo_compile.hardware import PROFILES


def costs_of(fn, *args):
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(fn, tracing_mode="fake")(*args)
    return {str(n.target): node_cost(n, PROFILES["a800-80gb"]) for n in gm.graph.nodes if n.op == "call_function"}


def test_a_product_costs_two_flops_for_each_multiplication():
    cost = costs_of(torch.mm, torch.ones(8, 16), torch.ones(16, 32))["aten.mm.default"]
    assert cost.flops == 2 * 8 * 16 * 32
    assert cost.bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)


def test_causal_attention_costs_half():
    q = torch.ones(1, 4, 64, 8)
    name = "aten._scaled_dot_product_flash_attention_for_cpu.default"

    def attend(q, causal):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)

    causal, full = costs_of(lambda q: attend(q, True), q)[name], costs_of(lambda q: attend(q, False), q)[name]
    assert full.flops == 2 * 2 * 4 * 64 * 64 * 8
    assert causal.flops == full.flops / 2


def test_views_cost_nothing():
    assert costs_of(lambda x: x.view(4, 2), torch.ones(8))["aten.view.default"].seconds == 0
