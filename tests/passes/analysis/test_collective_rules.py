"""The token axis through torch's functional collectives, which run whole, and through a block's inputs."""

import pytest
import torch
from torch.distributed import _functional_collectives  # noqa: F401  registers the ops
from torch.fx.experimental.proxy_tensor import make_fx

import memo_compile
from memo_compile.models.llama import Block, LlamaConfig, rotary_tables
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import annotate_tokens
from memo_compile.passes.fx.facts import is_pure
from memo_compile.passes.fx.meta import TOKENS

RANKS, ROWS, WIDTH = 2, 8, 4
c10d = torch.ops._c10d_functional


def gather(x):
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x, RANKS, "group"))


def scatter(x):
    return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", RANKS, "group"))


def reduce(x):
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", "group"))


def swap(x):
    return c10d.wait_tensor(c10d.all_to_all_single(x, [ROWS // 2] * 2, [ROWS // 2] * 2, "group"))


def followed(fn, x=None):
    """The waits in the graph of `fn`, and what is known of its last value, from its input's first dimension."""
    gm = make_fx(fn, tracing_mode="fake")(torch.ones(ROWS, WIDTH) if x is None else x)
    annotate_tokens(gm, gm.graph.find_nodes(op="placeholder"))
    waits = gm.graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)
    (output,) = gm.graph.find_nodes(op="output")
    return waits, output.args[0].meta.get(TOKENS)


@pytest.mark.parametrize(
    ("fn", "axis"),
    [
        (lambda x: gather(x).sin(), TokenAxis(0, RANKS, ROWS, 1)),
        (lambda x: scatter(gather(x)).sin(), TokenAxis(0, 1, ROWS, 1)),
        (lambda x: scatter(x).sin(), TokenAxis(0, 1, ROWS // RANKS, 1)),
        (lambda x: reduce(x.sin()).sin(), TokenAxis(0, 1, ROWS, 1)),
        (lambda x: swap(x.sin()).sin(), TokenAxis(0, 1, ROWS, 1)),
    ],
    ids=["gather", "gather and scatter", "scatter", "reduce", "all-to-all"],
)
def test_rows_after_a_collective_are_rows_of_what_it_gives(fn, axis):
    _, info = followed(fn)
    assert info.axis == axis
    assert info.sliceable


@pytest.mark.parametrize(("fn", "by_rows"), [(gather, False), (scatter, False), (swap, False), (reduce, True)])
def test_a_collective_that_moves_rows_runs_whole(fn, by_rows):
    (wait,), _ = followed(fn)
    assert wait.meta[TOKENS].sliceable == by_rows


@pytest.mark.parametrize("fn", [gather, scatter, swap, reduce])
def test_collectives_run_once(fn):
    (wait,), _ = followed(fn)
    assert not is_pure(wait.args[0])
    assert not is_pure(wait)


def test_each_input_of_a_block_is_followed_along_its_own_dimension():
    """Hidden states are (batch, tokens, width), tables (tokens, size); the value projection meets no table."""
    torch.manual_seed(0)
    block = Block(LlamaConfig(width=64, heads=4, kv_heads=2, ffn=192))
    x = torch.randn(1, 1024, 64, requires_grad=True)
    plan = memo_compile.plan(block, (x, *rotary_tables(1024, 16, 1e4, x)), options={"memory_budget": "min"})
    assert [a for a in plan.activations if a.bytes >= 16 * 1024 and a.tokens == 1] == []
    assert plan.token_axis == "dimensions 0 and 1 of the data inputs (1024 tokens)"
