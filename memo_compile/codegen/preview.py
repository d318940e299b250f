"""Runs Inductor up to the finished body of a graph, and no further: no C++ or Triton is compiled, nothing is loaded.

What comes back is the order and the storages that the real compilation of the same graph will emit, since it is the
same code that makes them.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `compile_fx_inner`, and of `torch.fx._lazy_graph_module`
`_make_graph_module` and `_use_lazy_graph_module`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from memo_compile.codegen.emitted.body import Body, Kind, Storage
from memo_compile.codegen.lowered import Lowered, given, may_go_on
from memo_compile.codegen.wrapper import BodyCaptured, Emission, Hooks, arena_wrapper


def dry_run(gm: fx.GraphModule, **how: Any) -> Body:
    """The body that Inductor would emit for `gm`; takes what `dry_emission` takes."""
    return dry_emission(gm, **how).body


def dry_emission(
    gm: fx.GraphModule,
    *,
    is_backward: bool,
    user_visible: Sequence[int] = (),
    static_inputs: Sequence[int] = (),
    input_strides: dict[str, tuple[int, ...]] | None = None,
    scalar: bool = False,
    device: str | None = None,
    keep: bool = False,
) -> Emission:
    """What Inductor would emit for `gm`.

    Args:
        user_visible: indices of outputs whose strides the user sees, which Inductor then keeps.
        static_inputs: indices of inputs at fixed addresses (parameters).
        input_strides: strides of inputs that differ from those of the trace, by placeholder name.
        scalar: write C++ kernels without their vectorized loops, in two thirds of the time. Which buffers a kernel
            reads and writes does not depend on them, except that rarely two loops that share a local buffer are not
            joined: the caller compares with what is emitted in the end. Kernels from templates have no other loops,
            and so have graphs with any of those.
        device: as in `Hooks`.
        keep: the emission has what the compilation of the same graph can go on with, where torch is known to allow it.
    """
    from torch._inductor import config  # loads Inductor
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V

    with _use_lazy_graph_module(True):  # nobody calls it: its text need not be written after every pass
        twin = twin_of(gm)
    graph = twin.graph
    (output,) = graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = list(user_visible)
    inputs = [_restrided(n, (input_strides or {}).get(n.name)) for n in graph.find_nodes(op="placeholder")]
    kwargs: dict[str, Any] = {
        "static_input_idxs": list(static_inputs),
        "cudagraphs": BoxedBool(False),
        "graph_id": None,
        "is_inference": False,
        "is_backward": is_backward,
    }
    of = given(twin, inputs, kwargs) if keep and may_go_on() else None

    def capture(emission: Emission) -> Any:
        lowered = Lowered(twin, V.graph, V.fake_mode, of) if of is not None else None
        raise BodyCaptured(replace(emission, lowered=lowered))

    hooks = Hooks(_placed_nowhere, arrange=capture, device=device)
    with arena_wrapper(hooks), config.patch({"cpp.simdlen": 1} if scalar and not _has_templates(gm) else {}):
        try:
            compile_fx_inner(twin, inputs, **kwargs)
        except BodyCaptured as captured:
            return captured.args[0]
    body = _without_calls(graph)  # Inductor emits nothing where nothing is computed
    return Emission((), body)


def _placed_nowhere(_: Body) -> Any:
    return (), ()


def _has_templates(gm: fx.GraphModule) -> bool:
    """Whether Inductor may fill in templates whose matmuls are written for vector units alone."""
    from torch._inductor import config  # loads Inductor

    if config.max_autotune or config.max_autotune_gemm:
        return True
    graphs = (m for m in gm.modules() if isinstance(m, fx.GraphModule))
    return any("flex_attention" in str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function")


def twin_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of the same, down to its regions and branches: Inductor's passes rewrite these, too."""
    twin: fx.GraphModule = _make_graph_module(gm, copy.deepcopy(gm.graph))
    for name, inner in twin.named_children():
        if isinstance(inner, fx.GraphModule):
            setattr(twin, name, twin_of(inner))
    return twin


def _without_calls(graph: fx.Graph) -> Body:
    """The body of a graph that only hands on what it is given."""
    (output,) = graph.find_nodes(op="output")
    inputs = tuple(n.name for n in graph.find_nodes(op="placeholder"))
    storages = {name: Storage(name=name, kind=Kind.INPUT, bytes=0, start=0, end=0) for name in inputs}
    return Body(0, storages, tuple(getattr(n, "name", None) for n in output.args[0]), inputs)


def _restrided(node: fx.Node, stride: tuple[int, ...] | None) -> Any:
    value = node.meta["val"]
    if stride is None or not isinstance(value, torch.Tensor) or tuple(value.stride()) == stride:
        return value
    return value.as_strided(value.shape, stride)
