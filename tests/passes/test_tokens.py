"""The token axis: followed as far as it goes, and no further."""

import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.planner import SMALL
from memo_compile.passes.tokens import META, annotate_tokens, slice_value, sliced_copy

TOKENS, WIDTH = 6, 4


def annotated(fn, *args):
    gm = make_fx(fn, tracing_mode="fake")(*args)
    report = annotate_tokens(gm, gm.graph.find_nodes(op="placeholder")[:1])
    return gm, report


# Each op maps a tensor whose token axis is dimension `dim` to another one; mixing ops are among them.
OPS = {
    "linear": lambda x: x @ torch.arange(x.shape[-1] * 3.0).view(x.shape[-1], 3).cos().to(x.dtype),
    "norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "residual": lambda x: x + x.sin(),
    "scale": lambda x: x * torch.arange(x.shape[-1]).to(x.dtype),
    "softmax": lambda x: x.softmax(-1),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "halves": lambda x: torch.cat([-x.chunk(2, -1)[0], x], -1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "swap": lambda x: x.transpose(0, 1) if x.dim() > 2 else x,
    "flatten": lambda x: x.flatten(0, 1) if x.dim() > 2 else x,
    "mix": lambda x: x.softmax(-2),
    "cumsum": lambda x: x.cumsum(-2),
    "flip": lambda x: x.flip(-2),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 1)),
}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=7), st.integers(1, 3), st.data())
def test_slices_of_random_chains_equal_slices_of_the_whole(names, batch, data):
    def chain(x):
        values = []
        for name in names:
            x = OPS[name](x)
            values.append(x)
        return values

    x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm, _ = annotated(chain, x)
    sliceable = [n for n in gm.graph.nodes if n.op == "call_function" and META in n.meta and n.meta[META].sliceable]
    for node in sliceable:
        axis = node.meta[META].axis
        lo = data.draw(st.integers(0, axis.tokens - 1))
        hi = data.draw(st.integers(lo + 1, axis.tokens))
        whole, rows = compute(gm, node, x, lo, hi)
        torch.testing.assert_close(rows, whole, rtol=1e-12, atol=1e-12)


def compute(gm, target, x, lo, hi):
    """Rows [lo, hi) of a node's value: cut from the whole, and computed from sliced operands."""
    graph = torch.fx.Graph()
    copies = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            break
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta["val"] = node.meta["val"]
    info = target.meta[META]
    if not isinstance(target.meta["val"], torch.Tensor):
        graph.output((copies[next(iter(gm.graph.find_nodes(op="placeholder")))],) * 2)
    else:
        operands = {
            a: copies[a] if need is None else slice_value(graph, copies[a], need, lo, hi)
            for a, need in zip(target.all_input_nodes, info.operands, strict=True)
            if isinstance(a.meta["val"], torch.Tensor)
        }
        if len(operands) < len(target.all_input_nodes):
            graph.output((copies[target], copies[target]))
        else:
            rows = sliced_copy(graph, target, info, operands, lo, hi)
            graph.output((slice_value(graph, copies[target], info.axis, lo, hi), rows))
    return torch.fx.GraphModule(gm, graph)(x)


def test_the_sequence_is_the_axis_at_batch_one():
    gm, report = annotated(lambda x: x.cos(), torch.ones(1, 16, 4))
    assert report.tokens == 16


def test_a_mixing_op_ends_the_axis_and_says_where():
    gm, report = annotated(lambda x: x.cumsum(1).cos(), torch.ones(1, 16, 4))
    assert [stop.op for stop in report.stops] == ["aten.cumsum.default"]
    assert all(META not in n.meta for n in gm.graph.nodes if n.op == "call_function")


def test_an_unknown_op_ends_the_axis():
    _, report = annotated(lambda x: x.roll(1, 1), torch.ones(1, 16, 4))
    assert "no rule" in report.stops[0].reason


def test_other_bits_of_the_same_size_end_the_axis():
    """A view as another type is of the name of a view of another shape, and would be sliced as one."""
    gm, report = annotated(lambda x: x.cos().view(torch.int32).bitwise_and(3), torch.ones(1, 16, 4))
    assert "no rule for aten.view.dtype" in report.stops[0].reason


def test_equal_sizes_do_not_fool_it():
    """A square product's other dimension has as many columns as there are tokens, and is not the token axis."""
    gm, _ = annotated(lambda x: (x @ x.new_ones(16, 16)).transpose(0, 1), torch.ones(16, 16))
    last = [n for n in gm.graph.nodes if n.op == "call_function"][-1]
    assert last.meta[META].axis.dim == 1


def test_every_saved_activation_of_the_reference_models_and_hf_llama_is_sliceable():
    import memo_compile

    for name in ("llama", "gpt", "hf-llama"):
        for size in (1, 3):
            x = zoo.batch(size)
            plan = memo_compile.plan(zoo.make(name), (x,), {"labels": x}, {"memory_budget": "min"})
            large = [a for a in plan.activations if a.bytes >= SMALL]
            assert large
            for a in large:
                assert a.tokens > 1, (name, a.name, a.reason)
