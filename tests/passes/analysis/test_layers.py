"""Layers are found from the graph alone: what repeats, where it begins, and which gradients belong to it."""

from collections import Counter
from itertools import pairwise

import graphs
import pytest
import torch
import transformers
import zoo
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.analysis.layers import LayerReport, annotate_layers
from memo_compile.passes.fx.meta import LAYER


def found(joint):
    report = annotate_layers(joint)
    return report, [n for n in joint.graph.nodes if LAYER in n.meta]


def forward_only(fn, *args):
    gm = make_fx(fn, tracing_mode="fake")(*args)
    return gm, annotate_layers(gm)


def in_layer(nodes, index, op):
    return [n for n in nodes if n.meta[LAYER].index == index and op in str(n.target)]


def hf_t5():
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=4,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).train()


class UNet(nn.Module):
    """Every level has its own width; skips go from the way down to the way up."""

    def __init__(self):
        super().__init__()
        widths = (3, 8, 16, 32)
        self.down = nn.ModuleList(self.twice(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in ((8, 16), (16, 32)))
        self.join = nn.ModuleList(self.twice(2 * a, a) for a in (8, 16))
        self.last = nn.Conv2d(8, 1, 1)

    @staticmethod
    def twice(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU())

    def forward(self, x):
        skips = []
        for level in self.down:
            x = level(x if not skips else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in reversed(list(zip(self.up, self.join, skips, strict=False))):
            x = join(torch.cat([skip, up(x)], 1))
        return self.last(x).mean()


@pytest.mark.parametrize("name", ["hf-llama", "hf-gpt2-dropout", "hf-bert-dropout"])
def test_each_block_of_a_transformer_is_a_layer(name):
    x = zoo.batch(2)
    joint = graphs.joint_of(zoo.make(name), x, labels=x)
    report, nodes = found(joint)
    assert len(report.classes) == 2
    for index in range(2):
        forward = [n for n in in_layer(nodes, index, "") if "backward" not in str(n.target)]
        contractions = Counter(str(n.target) for n in forward if "addmm" in str(n.target) or "aten.mm" in str(n.target))
        assert sum(contractions.values()) >= 4
    attentions = [len(in_layer(nodes, i, "softmax") + in_layer(nodes, i, "scaled_dot")) for i in range(2)]
    assert attentions[0] == attentions[1]


@pytest.mark.parametrize("name", ["llama", "gpt-dropout"])
def test_layers_of_one_class_are_equal_node_by_node(name):
    x = zoo.batch(1)
    joint = graphs.joint_of(zoo.make(name), x, labels=x)
    report, nodes = found(joint)
    assert report.classes == (0, 0)
    tangent = next(i for i, n in enumerate(joint.graph.nodes) if any("tangents" in a.name for a in n.all_input_nodes))
    calls = set(list(joint.graph.nodes)[:tangent])
    first, second = ([n for n in nodes if n in calls and n.meta[LAYER].index == i] for i in range(2))
    assert [str(n.target) for n in first] == [str(n.target) for n in second]
    assert [n.meta[LAYER].position for n in first] == list(range(len(first)))


def test_a_llama_layer_begins_with_its_first_norm():
    x = zoo.batch(1)
    _, nodes = found(graphs.joint_of(zoo.make("llama"), x, labels=x))
    firsts = [next(n for n in nodes if n.meta[LAYER].index == i) for i in range(2)]
    assert [n.target for n in firsts] == [torch.ops.aten.pow.Tensor_Scalar] * 2


def test_gradients_belong_to_the_layer_whose_weights_they_are_of():
    x = zoo.batch(1)
    model = zoo.make("llama")
    joint = graphs.joint_of(model, x, labels=x)
    found(joint)
    (output,) = joint.graph.find_nodes(op="output")
    placeholders = joint.graph.find_nodes(op="placeholder")
    gradients = output.args[0][1:]
    layers_of_gradients = [g.meta[LAYER].index if g is not None and LAYER in g.meta else None for g in gradients]
    for placeholder, layer in zip(placeholders, layers_of_gradients, strict=False):
        users = {n.meta[LAYER].index for n in placeholder.users if LAYER in n.meta}
        name = str(placeholder.target)
        if "primals" in name and layer is not None and len(users) == 1:
            assert users == {layer}, name
    assert {0, 1} <= set(layers_of_gradients)


class _Scaled(torch.autograd.Function):
    """Its backward reads what its forward does not."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


class ConstantFirst(nn.Module):
    """A constant is used before all layers, and then by the gradient of the loss."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        two = torch.full((), 2.0, dtype=x.dtype)
        x = x * two
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return _Scaled.apply(x, two).sum()


def test_a_constant_that_the_first_layers_share_with_the_loss_does_not_end_the_backward_of_all():
    _, nodes = found(graphs.joint_of(ConstantFirst().double(), torch.randn(16, 8).double()))
    gradients = {n.meta[LAYER].index for n in nodes if n.target is torch.ops.aten.mm.default}
    assert gradients == {0, 1, 2, 3}


def test_where_nothing_repeats_there_are_no_stacks():
    assert LayerReport(()).stacks() == []


def test_two_stacks_are_two_classes_and_the_first_layer_of_each_makes_the_position_bias():
    x = zoo.batch(1)
    report, _ = found(graphs.joint_of(hf_t5(), input_ids=x, decoder_input_ids=x, labels=x))
    assert len(report.classes) == 3 + 4
    encoder, decoder = report.classes[:3], report.classes[3:]
    assert encoder[1:] == (encoder[1],) * 2
    assert decoder[1:] == (decoder[1],) * 3
    assert len({encoder[0], encoder[1], decoder[0], decoder[1]}) == 4


def test_a_unet_has_no_layers():
    report, nodes = found(graphs.joint_of(UNet(), torch.randn(2, 3, 16, 16)))
    assert report.classes == ()
    assert not nodes


def test_projections_of_one_input_repeat_and_are_no_layers():
    def attend(x, q, k, v):
        q, k, v = ((x @ w).view(4, 2, 4).transpose(0, 1).sin() for w in (q, k, v))
        return (q @ k.mT).softmax(-1) @ v

    _, report = forward_only(attend, torch.ones(4, 8), *torch.ones(3, 8, 8))
    assert report.classes == ()


def test_layers_that_share_their_weights_are_layers():
    def albert(x, w):
        for _ in range(5):
            x = x + (x.tanh() @ w).sin() * 2
        return x

    _, report = forward_only(albert, torch.ones(4, 8), torch.ones(8, 8))
    assert report.classes == (0,) * 5


def test_a_stack_that_is_interrupted_keeps_one_class():
    def block(x, w):
        return x + (x.tanh() @ w).sin().relu() * 2

    def hybrid(x, w):
        for _ in range(3):
            x = block(x, w)
        x = (x.cumsum(0).cos() @ w).softmax(-1).exp().log() @ w
        for _ in range(2):
            x = block(x, w)
        return x

    _, report = forward_only(hybrid, torch.ones(4, 8), torch.ones(8, 8))
    assert report.classes == (0,) * 5


def test_alternating_blocks_repeat_in_pairs():
    def alternating(x, w):
        for _ in range(4):
            x = x + (x.tanh() @ w).sin() * 2
            x = x * (x.cos() @ w).relu().exp()
        return x

    _, report = forward_only(alternating, torch.ones(4, 8), torch.ones(8, 8))
    assert report.classes == (0,) * 4


def test_a_hundred_and_sixty_layers_are_found():
    def deep(x, w):
        for _ in range(160):
            x = x + (x.tanh() @ w).sin().relu() * 2
        return x.sum()

    _, report = forward_only(deep, torch.ones(4, 8), torch.ones(8, 8))
    assert report.classes == (0,) * 160
    assert report.stacks() == [range(160)]
