"""Planned graphs that run op by op leave alone what a trace in another thread reads."""

import torch
import torch.fx as fx
from torch.fx import traceback

from memo_compile.codegen.interpreter import _interpreted


def test_running_notes_no_node_while_another_thread_traces():
    """A trace notes for each op of which backward it is: where a run changed that note, it ended in an assertion."""
    seen = []

    def look(x):
        seen.append(dict(traceback.current_meta))
        return x + 1

    graph = fx.Graph()
    result = graph.call_function(look, (graph.placeholder("x"),))
    result.meta["stack_trace"] = "of what runs"
    graph.output((result,))
    run = _interpreted(fx.GraphModule({}, graph), ())
    with traceback.preserve_node_meta():
        traceback.current_meta["in_grad_fn"] = 1
        (got,) = run([torch.zeros(2)])
    assert got.tolist() == [1, 1]
    assert seen == [{"in_grad_fn": 1}]
