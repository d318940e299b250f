"""Which inputs of a backward Inductor may write over: those that it is told, and none of a region's."""

import pytest
import torch
from torch._guards import TracingContext, tracing
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode

from memo_compile.codegen.donation import donating, nothing_donated


def told():
    metadata = TracingContext.get().fw_metadata
    return None if metadata is None else metadata.bw_donated_idxs


@pytest.fixture
def context():
    with tracing(TracingContext(FakeTensorMode())):
        yield TracingContext.get()


class Metadata:
    bw_donated_idxs = (7,)
    other = "kept"


@pytest.mark.parametrize("metadata", [None, Metadata()])
def test_inductor_is_told_while_it_compiles(context, metadata):
    context.fw_metadata = metadata
    with donating([1, 2]):
        assert told() == [1, 2]
        assert metadata is None or context.fw_metadata.other == "kept"
    assert context.fw_metadata is metadata


def test_a_region_is_given_none(context, monkeypatch):
    """Its inputs are others: input 1 of a region is not input 1 of the graph."""
    seen = []
    monkeypatch.setattr(GraphLowering, "make_subgraph", lambda self, *args: seen.append(told()))
    with donating([1, 2]):
        GraphLowering.make_subgraph(None)
        assert told() == [1, 2]
    GraphLowering.make_subgraph(None)
    assert seen == [[], None]


def test_an_error_leaves_all_as_it_was(context):
    before = GraphLowering.make_subgraph
    with pytest.raises(ZeroDivisionError), donating([1]):
        raise ZeroDivisionError
    assert (context.fw_metadata, GraphLowering.make_subgraph) == (None, before)


def test_nothing_is_donated_while_the_forward_is_compiled(context):
    context.fw_metadata = Metadata()
    nothing_donated()
    assert told() == []


def test_names_that_torch_may_change():
    assert callable(GraphLowering.make_subgraph)
    assert "fw_metadata" in vars(TracingContext(FakeTensorMode()))
    assert torch._functorch.config.donated_buffer in (True, False)
