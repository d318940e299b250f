"""The token axis: followed as far as it goes, and no further."""

import inspect
import operator

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import memo_compile
from memo_compile.passes.analysis.tokens import annotate_tokens
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.transforms.token_slices import slice_value, sliced_copy
from memo_compile.planning.problem import view_of
from memo_compile.trace.offline import trace
from memo_compile.trace.setting import limits_for

ROWS, WIDTH = 6, 4


def annotated(fn, *args, decompositions=None):
    gm = make_fx(fn, decomposition_table=decompositions, tracing_mode="fake")(*args)
    report = annotate_tokens(gm, gm.graph.find_nodes(op="placeholder")[:1])
    return gm, report


def table(rows, columns, x):
    """Numbers that no data input reaches."""
    return torch.arange(rows * columns).view(rows, columns).cos().to(x.dtype)


def columns(x):
    """A column for each token, from its values."""
    return 3 * x.argmax(-1) % x.shape[-1]


def pair(x):
    return torch.cat([x.unsqueeze(0), x.sin().unsqueeze(0)], 0)


def square(x):
    x = x.flatten(0, -2)
    x = F.pad(x, (0, x.shape[0] - x.shape[1]))
    return x @ x


def cross_entropy(x):
    losses = F.cross_entropy(x.flatten(0, -2), columns(x).flatten(), reduction="none")
    return losses.view(*x.shape[:-1], 1) * table(1, 3, x)


# Each op maps a tensor whose last dimension is the width to another one. These leave every token alone,
TOKENWISE = {
    "linear": lambda x: x @ table(x.shape[-1], 3, x),
    "affine": lambda x: F.linear(x, table(3, x.shape[-1], x), table(1, 3, x)[0]),
    "outer product": lambda x: (x.unsqueeze(-1) @ x.sin().unsqueeze(-2)).sum(-2),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:], table(1, x.shape[-1], x)[0]),
    "statistics": lambda x: sum(torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)),
    "variance": lambda x: x - torch.var_mean(x, -1, keepdim=True)[0],
    "gelu": lambda x: F.gelu(x),
    "residual": lambda x: x + x.sin(),
    "scale": lambda x: x * torch.arange(x.shape[-1]).to(x.dtype),
    "positions": lambda x: x * table(x.shape[-2], 1, x),
    "softmax": lambda x: x.softmax(-1),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "halves": lambda x: torch.cat([-x.chunk(2, -1)[0], x], -1),
    "split": lambda x: torch.cat(x.split(1, -1)[::-1], -1),
    "unbind": lambda x: x * x.unbind(-1)[-1].unsqueeze(-1),
    "unbind pair": lambda x: pair(x).unbind(0)[1],
    "select": lambda x: x * x.select(-1, 0).unsqueeze(-1),
    "select pair": lambda x: pair(x).select(0, 1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "swap": lambda x: x.transpose(0, 1) if x.dim() > 2 else x,
    "flatten": lambda x: x.flatten(0, 1) if x.dim() > 2 else x,
    "pad": lambda x: F.pad(x, (1, 1)),
    "gather": lambda x: x.gather(-1, columns(x).unsqueeze(-1).expand(x.shape)),
    "embedding": lambda x: F.embedding(columns(x), table(x.shape[-1], 3, x)),
    "cross-entropy": cross_entropy,
    "columns written": lambda x: torch.slice_scatter(x, x.sin()[..., :1], -1, 0, 1),
    "column written": lambda x: torch.select_scatter(x, x.sin().select(-1, 0), -1, 0),
}
# and these may read others, or have no rule.
MIXING = {
    "mix": lambda x: x.softmax(-2),
    "cumsum": lambda x: x.cumsum(-2),
    "flip": lambda x: x.flip(-2),
    "norm of rows": lambda x: F.layer_norm(x, x.shape[-2:]),
    "shift": lambda x: F.pad(x, (0, 0, 1, -1)),
    "rows": lambda x: torch.cat(x.split(1, -2)[::-1], -2),
    "rows picked": lambda x: x.gather(-2, x.argmax(-2, keepdim=True).expand(x.shape)),
    "rows looked up": lambda x: F.embedding(x.argmax(-2), x.flatten(0, -2)).flatten(-2),
    "product of rows": lambda x: x @ (x.transpose(-1, -2) @ x),
    "square": square,
    "rows written": lambda x: torch.slice_scatter(x, x.sin()[..., :-1, :], -2, 1, x.shape[-2]),
    "row written": lambda x: torch.select_scatter(x, x.sin().select(-2, 0), -2, 0),
}
BEGINNINGS = {
    "values": lambda x: x,
    "ids": lambda x: F.embedding((x.sum(-1) * 100).long() % 7, table(7, WIDTH, x)),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(BEGINNINGS)),
    st.lists(st.sampled_from(sorted(TOKENWISE)), max_size=4),
    st.sampled_from(sorted(MIXING)),
    st.lists(st.sampled_from(sorted(TOKENWISE)), max_size=2),
    st.integers(1, 3),
    st.booleans(),
    st.data(),
)
def test_slices_of_random_chains_equal_slices_of_the_whole(begin, before, mixing, after, batch, inductors, data):
    def chain(x):
        values = [BEGINNINGS[begin](x)]
        for name in [*before, mixing, *after]:
            values.append((TOKENWISE | MIXING)[name](values[-1]))
        return values

    x = torch.randn(batch, ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm, _ = annotated(chain, x, decompositions=select_decomp_table() if inductors else None)
    (output,) = gm.graph.find_nodes(op="output")
    if inductors or "cross-entropy" not in before:  # there is a rule for what Inductor makes of it
        assert all(is_sliceable(n) or n.op == "placeholder" for n in output.args[0][: len(before) + 1])
    drawn = {}
    for node in filter(is_sliceable, gm.graph.nodes):
        lo = data.draw(st.integers(0, node.meta[TOKENS].axis.tokens - 1))
        drawn[node] = lo, data.draw(st.integers(lo + 1, node.meta[TOKENS].axis.tokens))
    for whole, rows in computed(gm, drawn, x):
        torch.testing.assert_close(rows, whole, rtol=1e-12, atol=1e-12)


def is_sliceable(node):
    """A tuple is sliced through its items."""
    return TOKENS in node.meta and node.meta[TOKENS].sliceable and isinstance(node.meta["val"], torch.Tensor)


def computed(gm, drawn, x):
    """Rows [lo, hi) of each node's value: cut from the whole, and computed from sliced operands."""
    graph = torch.fx.Graph()
    copies = {}
    for node in gm.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta["val"] = node.meta["val"]

    def operand(node, need, lo, hi):
        if need is None:
            return copies[node]
        return slice_value(graph, copies[node], need, lo, hi) if node not in tuples else rows_of(node, lo, hi)

    def rows_of(node, lo, hi):
        info = node.meta[TOKENS]
        needed = zip(node.all_input_nodes, info.operands, strict=True)
        return sliced_copy(graph, node, info, {a: operand(a, need, lo, hi) for a, need in needed}, lo, hi)

    tuples = {n for n in gm.graph.nodes if isinstance(n.meta.get("val"), (tuple, list))}
    pairs = [
        (slice_value(graph, copies[n], n.meta[TOKENS].axis, *rows), rows_of(n, *rows)) for n, rows in drawn.items()
    ]
    graph.output(tuple(pairs))
    return torch.fx.GraphModule(gm, graph)(x)


def test_the_sequence_is_the_axis_at_batch_one():
    _, report = annotated(lambda x: x.cos(), torch.ones(1, 16, 4))
    assert report.tokens == 16


def test_a_mixing_op_ends_the_axis_and_says_where():
    gm, report = annotated(lambda x: x.cumsum(1).cos(), torch.ones(1, 16, 4))
    assert [stop.op for stop in report.stops] == ["aten.cumsum.default"]
    assert all(TOKENS not in n.meta for n in gm.graph.nodes if n.op == "call_function")


def test_an_unknown_op_ends_the_axis():
    _, report = annotated(lambda x: x.roll(1, 1), torch.ones(1, 16, 4))
    assert "no rule" in report.stops[0].reason


class Shifted(torch.nn.Linear):
    def forward(self, x):
        y = super().forward(x).sin()
        y = y.roll(1, dims=1)
        return y.exp().sum()


def test_a_plan_names_the_source_line_at_which_the_axis_ends():
    lines, first = inspect.getsourcelines(Shifted.forward)
    (at,) = (i for i, line in enumerate(lines) if "roll" in line)
    stops = memo_compile.plan(Shifted(4, 4), (torch.ones(1, 16, 4),)).stops
    assert [s.source for s in stops] == [f"{__file__}:{first + at}: {lines[at].strip()}"]


def test_other_bits_of_the_same_size_end_the_axis():
    """A view as another type is of the name of a view of another shape, and would be sliced as one."""
    _, report = annotated(lambda x: x.cos().view(torch.int32).bitwise_and(3), torch.ones(1, 16, 4))
    assert "no rule for aten.view.dtype" in report.stops[0].reason


def test_a_constant_that_is_made_beside_a_value_neither_ends_the_axis_nor_has_it():
    gm, report = annotated(lambda x: (x.new_zeros(x.shape).exp(), x.cos()), torch.ones(1, 16, 4))
    assert report.stops == ()
    assert [TOKENS in n.meta for n in gm.graph.nodes if n.op == "call_function"] == [False, False, True]


def test_equal_sizes_do_not_fool_it():
    """A square matmul's other dimension has as many columns as there are tokens, and is not the token axis."""
    gm, _ = annotated(lambda x: (x @ x.new_ones(16, 16)).transpose(0, 1), torch.ones(16, 16))
    last = [n for n in gm.graph.nodes if n.op == "call_function"][-1]
    assert last.meta[TOKENS].axis.dim == 1


def of_attention(node):
    """Whether the node is a result of the op that mixes tokens in these models."""
    return node.target is operator.getitem and "attention" in str(node.args[0].target)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt", "hf-llama"])
def test_every_saved_activation_but_attentions_is_sliceable(name, size):
    x = zoo.batch(size)
    p, setting = trace(zoo.make(name), (x,), {"labels": x}, {"memory_budget": "min"})
    large = [n for n in p.saved if n.op != "placeholder" and n.meta["val"].numel() >= zoo.TOKENS]
    alone = [n for n in large if not of_attention(n)]
    assert len(alone) > 10
    assert len(large) - len(alone) == 2 * zoo.SMALL["layers"]  # its output and its sums of rows
    assert [n.name for n in alone if not is_sliceable(n)] == []
    axes = view_of(p, limits_for(setting, p.unplanned_peak)).axes
    assert axes
    assert None not in axes.values()
