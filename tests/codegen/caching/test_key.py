"""Graphs that ranks may plan together are kept by none: one that found an entry would leave the others waiting."""

import pytest
import torch
import torch.fx as fx
from torch import nn

import memo_compile
from memo_compile.codegen.caching.key import key_for
from memo_compile.trace.setting import setting_for


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setenv("MEMO_CACHE", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def graph_of(target):
    """A graph with a call of `target`, as the body of a region."""
    inner = fx.Graph()
    inner.output(inner.call_function(target, (inner.placeholder("x"), "sum", "0")))
    root = nn.Module()
    root.region = fx.GraphModule(nn.Module(), inner)
    graph = fx.Graph()
    graph.output(graph.call_module("region", (graph.placeholder("x"),)))
    return fx.GraphModule(root, graph)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("target", "kept"),
    [
        (torch.add, True),
        (nn.functional.linear, True),
        (torch.ops.aten.add.Tensor, True),
        (torch.ops._c10d_functional.all_reduce, False),
        (torch.ops._c10d_functional.all_reduce.default, False),
        (setting_for, False),
    ],
)
def test_a_graph_is_kept_where_it_is_known_to_stay_here(target, kept):
    setting = setting_for(memo_compile.Options(), [])
    assert (key_for(setting, graph_of(target), []) is not None) == kept


def test_alone_any_graph_is_kept():
    setting = setting_for(memo_compile.Options(), [])
    assert key_for(setting, graph_of(torch.ops._c10d_functional.all_reduce), [])
