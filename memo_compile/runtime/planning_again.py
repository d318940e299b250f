"""Planning and compiling in the midst of training, outside of Dynamo: with what a compiler finds around it there.

Private torch APIs, tried with torch 2.13: Dynamo's lock, its flag and its tracing context
(`torch/_dynamo/convert_frame.py`, `torch/compiler/__init__.py`), and what it leaves on a graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.fx as fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def one_compiles() -> Iterator[None]:
    """One thread at a time, whoever asks: tracing keeps state that all threads share."""
    from torch._dynamo.convert_frame import compile_lock  # loads Dynamo

    # Other threads that call what is compiled would else be told that FX traces them.
    compiling = getattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)
    with compile_lock, compiling():
        yield


@contextlib.contextmanager
def as_dynamo_would() -> Iterator[None]:
    """What a compiler finds around it when Dynamo calls it; sizes are numbers by now."""
    with one_compiles(), tracing(TracingContext(FakeTensorMode())):
        yield


def twin(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph to compile later, with the same modules and parameters: compiling rewrites a graph.

    By what is copied AOTAutograd knows parameters (`torch/_functorch/_aot_autograd/frontend_utils.py`).
    """
    made = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    made.meta.update(gm.meta)
    for node, original in zip(made.graph.nodes, gm.graph.nodes, strict=True):
        node.__dict__.update({k: v for k, v in original.__dict__.items() if k == "_dynamo_source"})
    if hasattr(gm, "_param_name_to_source"):
        made._param_name_to_source = gm._param_name_to_source
    return made
