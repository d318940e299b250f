"""The split of a joint graph: what is saved, and what is recomputed from what."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_function
from torch.utils.checkpoint import CheckpointPolicy

from memo_compile.errors import DrawnTwice
from memo_compile.passes.analysis.liveness import last_reads, lifetimes
from memo_compile.passes.analysis.recompute_chains import recompute_chain
from memo_compile.passes.analysis.user_checkpoints import MARK, policies_of
from memo_compile.passes.fx.facts import is_seed, nbytes
from memo_compile.passes.transforms.partition import (
    canonical_saved,
    order_backward,
    split_min_cut,
    split_saving,
)


def joint_of(fn, *args):
    """The joint graph of `fn`, and the number of its forward outputs."""
    seen = {}

    def partition(joint, inputs, *, num_fwd_outputs, static_lifetime_input_indices=None, **_):
        split = split_min_cut(joint, inputs, num_fwd_outputs, static_lifetime_input_indices)
        seen["joint"], seen["split"] = joint, split
        return split.forward, split.backward

    def run(gm, _):
        def call(args):
            return list(gm(*args))

        call._boxed_call = True
        return call

    out = aot_function(fn, fw_compiler=run, bw_compiler=run, partition_fn=partition)(*args)
    out.sum().backward()
    return seen["joint"], seen["split"]


def repeat_kv(x, w):
    k = torch.mm(x, w)
    wide = k.view(8, 1, 4).expand(8, 3, 4).reshape(8, 12)
    return (wide.sin() * wide).sum()


def test_an_expanded_value_gives_way_to_its_smallest_ancestor():
    x, w = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    joint, split = joint_of(repeat_kv, x, w)
    by_name = {n.name: n for n in joint.graph.nodes}
    saved = canonical_saved(joint, [by_name[n] for n in split.saved])
    assert max(n.meta["val"].numel() for n in saved if n.op != "placeholder") == 8 * 4


def dropped(x, w):
    return (torch.nn.functional.dropout(torch.mm(x, w), 0.5, training=True) ** 2).sum()


def test_random_numbers_are_never_made_again():
    joint, _ = joint_of(dropped, torch.randn(8, 4), torch.randn(4, 4, requires_grad=True))
    random = next(n for n in joint.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()))
    assert recompute_chain(random, set()) is None


def test_a_split_saves_what_it_was_told_and_makes_the_rest_again():
    x, w = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    joint, split = joint_of(repeat_kv, x, w)
    inputs = [n for n in joint.graph.nodes if n.op == "placeholder" and "tangents" not in n.name]
    whole = split_saving(joint, inputs, split.num_forward_outputs)
    assert "mm" not in whole.saved
    backward = order_backward(whole.backward)
    assert any(n.target is torch.ops.aten.mm.default and n.name == "mm" for n in backward.graph.nodes)


def test_a_split_leaves_the_marks_of_a_users_checkpoints_as_they_are():
    """torch writes marks of its own between two checkpoints, which the next to ask would take for the user's."""
    joint, split = joint_of(repeat_kv, torch.randn(8, 4), torch.randn(4, 4, requires_grad=True))
    for region, node in enumerate(n for n in joint.graph.nodes if n.op == "call_function"):
        node.meta |= {MARK: CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": region}
    inputs = [n.meta["val"] for n in joint.graph.find_nodes(op="placeholder")]
    before = policies_of(joint)
    split_min_cut(joint, inputs, split.num_forward_outputs, None)
    assert policies_of(joint) == before
    assert before.suggested


def test_a_value_dies_after_its_last_reader():
    x, w = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    _, split = joint_of(repeat_kv, x, w)
    spans = lifetimes(split.forward, fused=False)
    reads = last_reads(split.forward, fused=False)
    for name, span in spans.ranges.items():
        assert span.start < span.end
        if name in reads:
            assert span.end == min(reads[name] + 1, spans.steps)


def test_a_normalized_value_gives_way_to_what_it_was_made_from():
    def block(x, weight):
        y = x @ weight
        centred = y - y.mean(-1, keepdim=True)
        return (centred * centred.square().mean(-1, keepdim=True).add(1e-5).rsqrt()) @ weight

    joint, split = joint_of(block, torch.randn(128, 64), torch.randn(64, 64, requires_grad=True))
    by_name = {n.name: n for n in joint.graph.nodes}
    saved = canonical_saved(joint, [by_name[name] for name in split.saved])
    large = [n for n in saved if n.op != "placeholder" and nbytes(n) > 128 * 4]
    assert [str(n.target) for n in large] == ["aten.mm.default"]


def test_a_draw_is_made_again_only_from_its_saved_seed():
    from torch._inductor import inductor_prims

    def drop(x):
        seed = inductor_prims.lookup_seed(inductor_prims.seeds(1, torch.device("cpu")), 0)
        mask = inductor_prims.random([128, 64], seed, "rand") > 0.1
        return (x * mask).sin()

    joint, split = joint_of(drop, torch.randn(128, 64, requires_grad=True))
    by_name = {n.name: n for n in joint.graph.nodes}
    saved = canonical_saved(joint, [by_name[name] for name in split.saved])
    (seeds,) = [n for n in saved if is_seed(n)]
    mask = next(n for n in saved if "gt" in n.name)
    assert recompute_chain(mask, {seeds}) is not None
    assert recompute_chain(mask, set()) is None
    with pytest.raises(DrawnTwice, match="seeds"):
        split_saving(joint, [n for n in saved if n not in (seeds, mask)], split.num_forward_outputs)
