"""Who looks on while a graph is compiled: told of each step, and never asked. `report.dumps.Dump` is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.fx as fx

from memo_compile.options import Options
from memo_compile.passes.pipeline import Graphs
from memo_compile.planning.decide import Decided
from memo_compile.planning.prepared import Prepared
from memo_compile.schema import Plan


class Observer(Protocol):
    """One graph's compilation, as it goes."""

    def joint(self, gm: fx.GraphModule, num_forward_outputs: int, static_inputs: list[int] | None) -> None:
        """The joint graph as it came in."""

    def watch(self, name: str, graphs: Graphs, found: Any) -> None:
        """A pass has run; see `passes.pipeline.Watch`."""

    def decided(self, p: Prepared, decided: Decided, options: Options) -> None:
        """The decision is taken."""

    def code(self, name: str, compiled: Any) -> None:
        """Inductor has emitted the graph of that name."""

    def measured(self, name: str, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """What to run in the place of a compiled graph."""

    def emitted(self, arguments: Mapping[str, Any]) -> None:
        """What the arena is laid out from."""

    def report(self, p: Prepared, decided: Decided, plan: Plan, emitted: Mapping[str, Any] | None = None) -> None:
        """All there is to show."""

    def plan(self, plan: Plan) -> None:
        """The plan, as it is carried out."""


Observe = Callable[[str | None, str], Observer]
"""Makes the observer of one graph, from the folder that `options.dump` names and the graph's name."""


class _Nobody:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def measured(self, name: str, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        return fn


def nobody(folder: str | None, name: str) -> Observer:
    """Looks at nothing."""
    found: Any = _Nobody()
    return found
