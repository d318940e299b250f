"""A dry run that is gone on with: what Inductor has lowered, fused and put in order once is emitted, not lowered again.

A dry run ends where the body of a graph is complete and its buffers have no places yet. If that graph is what is then
compiled, Inductor is given the lowering back as it was left. It is given what stands beside it, too: everything that a
lowering depends on is compared, and where anything differs the graph is lowered anew.

Private torch APIs, tried with torch 2.13: in `torch._inductor.compile_fx` the names of `_DONE` and `GraphLowering`; of
that class `run`, `codegen`, `graph_id` and `wrapper_code`, of this `generate` and `pop_codegened_graph`;
`TracingContext.fw_metadata.bw_donated_idxs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from memo_compile.codegen.given import lines_of, settings_of_inductor, value_text

TRIED = ((2, 13),)  # of torch: elsewhere all is lowered anew
# What `codegen_and_compile` does with a graph before it is lowered.
_DONE = ("view_to_reshape", "_recursive_record_original_output_strides", "_recursive_post_grad_passes")


def may_go_on() -> bool:
    """Whether torch is one whose lowerings may be gone on with."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) in TRIED


@dataclass(frozen=True)
class Given:
    """All that Inductor is given with a graph: the graph, what it is called with, and the settings."""

    graph: tuple[str, ...]
    inputs: tuple[str, ...]
    visible: tuple[Any, ...]
    static: tuple[int, ...]
    donated: tuple[int, ...]
    backward: bool
    others: tuple[str, ...]
    settings: Mapping[str, str]


def given(gm: fx.GraphModule, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """What `compile_fx_inner` is called with. An inference graph, or one for CUDA graphs, is like no other."""
    from torch._guards import TracingContext  # loads torch

    metadata: Any = TracingContext.get().fw_metadata
    special = ("is_inference", "cudagraphs", "cpp_wrapper", "fx_wrapper", "extern_node_serializer")
    others = [name for name in special if kwargs.get(name)]
    return Given(
        graph=tuple(lines_of(gm)),
        inputs=tuple(map(value_text, inputs)),
        visible=tuple(_visible(gm)),
        static=tuple(kwargs.get("static_input_idxs") or ()),
        donated=tuple(getattr(metadata, "bw_donated_idxs", None) or ()),
        backward=bool(kwargs.get("is_backward")),
        others=tuple(others),
        settings=settings_of_inductor(),
    )


def _visible(gm: fx.GraphModule) -> Iterator[Any]:
    """The outputs of a graph, and of those within it, whose strides the user sees."""
    (output,) = gm.graph.find_nodes(op="output")
    yield tuple(output.meta.get("user_visible_output_idxs") or ())
    for inner in gm.children():
        if isinstance(inner, fx.GraphModule):
            yield from _visible(inner)


@dataclass(frozen=True)
class Lowered:
    """A graph as Inductor's passes left it, and its lowering, up to the finished lines of the body.

    `given` is what it was lowered from, `fake_mode` what its values were made in.
    """

    gm: fx.GraphModule
    graph: Any
    fake_mode: Any
    given: Given

    def is_of(self, gm: fx.GraphModule, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether Inductor would lower this graph to the same."""
        return not self.given.others and given(gm, inputs, kwargs) == self.given

    @contextlib.contextmanager
    def gone_on_with(self, hooks: Any, graph_id: int | None) -> Iterator[None]:
        """Within, `compile_fx_inner` with `gm` goes on with the lowering; `hooks` are those of `arena_wrapper`."""
        from torch._inductor import compile_fx  # loads Inductor

        graph, module = self.graph, compile_fx
        stand_ins: dict[str, Any] = {
            **dict.fromkeys(_DONE, _nothing),
            "fake_tensor_prop": lambda *_, **__: self.fake_mode,
            "GraphLowering": lambda *_, **__: graph,
        }

        def emit() -> Any:
            wrapper = graph.wrapper_code
            wrapper.go_on(hooks)
            result = wrapper.generate(graph.is_inference)
            wrapper.pop_codegened_graph()
            return result

        before = {name: getattr(module, name) for name in stand_ins}
        graph.graph_id, graph.run, graph.codegen = graph_id, _nothing, emit
        for name, stand_in in stand_ins.items():
            setattr(module, name, stand_in)
        try:
            yield
        finally:
            for name, original in before.items():
                setattr(module, name, original)
            del graph.run, graph.codegen


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what was done already."""
