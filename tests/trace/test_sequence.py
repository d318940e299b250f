"""A rank's part of the tokens, of ranks that need not be there."""

import math

import pytest
import torch

from memo_compile.errors import NotShareable
from memo_compile.models import Llama, LlamaConfig
from memo_compile.passes.analysis.costs import graph_costs
from memo_compile.passes.transforms.sequence_shards import Part
from memo_compile.trace.offline import trace

TOKENS, VOCAB, WIDTH, RANKS = 256, 512, 32, 4


def joint(ranks, tokens=TOKENS):
    model = Llama(LlamaConfig(vocab=VOCAB, layers=1, width=WIDTH, heads=8, kv_heads=4, ffn=96))
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    part = Part("", ranks) if ranks > 1 else None
    return trace(model, (ids,), {"labels": ids}, {"hardware": "h100"}, part=part)[0]


def largest(p):
    """Elements of the largest value that is made."""
    made = [n.meta["val"] for n in p.joint.graph.nodes if n.op == "call_function"]
    return max(v.numel() for v in made if isinstance(v, torch.Tensor))


def test_nothing_as_wide_as_logits_is_made_whole():
    """Neither logits, nor what is made of labels alone: ones where a target is."""
    assert largest(joint(1)) == TOKENS * VOCAB
    assert largest(joint(RANKS)) == TOKENS * VOCAB // RANKS


def test_a_rank_does_its_share_of_the_matmuls():
    one, shared = (sum(p.flops.values()) for p in (joint(1), joint(RANKS)))
    assert shared == pytest.approx(one / RANKS)


def test_an_all_to_all_costs_what_goes_to_the_others():
    p = joint(RANKS)
    costs = graph_costs(p.joint, p.profile, fused=True)
    swaps = [n for n in p.joint.graph.nodes if "all_to_all" in str(n.target)]
    assert swaps
    for node in swaps:
        sent = 4 * math.prod(node.all_input_nodes[0].meta["val"].shape)
        assert costs[node.name].link_bytes == sent * (RANKS - 1) // RANKS


def test_tokens_that_cannot_be_shared_out_evenly_are_refused():
    with pytest.raises(NotShareable, match="254 tokens are no multiple of 4 ranks"):
        joint(RANKS, tokens=254)
