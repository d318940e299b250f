"""Plans every graph of a training step on fake tensors, with arenas from dry runs of Inductor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from memo_compile.codegen.compiler import look
from memo_compile.errors import NothingToPlan, memo_error
from memo_compile.options import Options
from memo_compile.planning.decide import Decided
from memo_compile.runtime.ops import register
from memo_compile.schema import Plan
from memo_compile.trace.observer import Observe, nobody
from memo_compile.versions import check_torch

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode


@dataclass(frozen=True)
class PlannedGraph:
    """One graph of a step: its plan, placed as Inductor would emit it, and the bytes that its transfers move."""

    plan: Plan
    bytes_out: int
    bytes_in: int


@dataclass(frozen=True)
class PlannedStep:
    """All graphs of a training step, in order, and the reasons why Dynamo broke between them."""

    graphs: tuple[PlannedGraph, ...]
    breaks: tuple[str, ...]


def plan_step(
    mode: FakeTensorMode,
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    observe: Observe = nobody,
) -> PlannedStep:
    """Plan every graph of one forward of `model` and its backward, with arenas from dry runs of Inductor.

    Args:
        mode: what the model and its inputs were made in. Each graph is run in it, so that the forward reaches the next.
        observe: makes the observer of each graph.
        model, args, kwargs: fake tensors throughout: nothing is allocated.

    Raises:
        MemoError: no graph needs gradients, a budget that cannot be kept, or a mistake in the options.
    """
    # Dynamo is imported where it is used: it takes a second.
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._dynamo.utils import counters

    check_torch()
    parsed = Options.parse(options)
    register()
    graphs: list[PlannedGraph] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        looked = look(gm, inputs, parsed, observe)
        if looked is not None:
            graphs.append(PlannedGraph(looked.plan, *_moved(looked.decided)))

        def forward(*values: Any) -> Any:
            with mode:
                return gm(*values)

        return forward

    torch._dynamo.reset()
    broken = counters["graph_break"].copy()
    try:
        torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
    except BackendCompilerFailed as error:
        mistake = memo_error(error)
        if mistake is None:
            raise
        raise mistake from None
    finally:
        torch._dynamo.reset()
    if not graphs:
        raise NothingToPlan("the model traced into no graph that needs gradients.")
    now = counters["graph_break"]
    return PlannedStep(tuple(graphs), tuple(why for why in now for _ in range(now[why] - broken[why])))


def _moved(decided: Decided) -> tuple[int, int]:
    """Bytes that the graphs copy to the host, and back."""

    def total(graph: fx.GraphModule, op: str) -> int:
        values = [n.args[0].meta["val"] for n in graph.graph.nodes if str(n.target) == op]
        return sum(v.numel() * v.element_size() for v in values)

    return total(decided.forward, "memo.offload.default"), total(decided.backward, "memo.prefetch_.default")
