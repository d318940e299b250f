"""How Inductor is called: with whose partitioner, with which settings, and with which passes around its scheduler.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `compile_fx(inner_compile, config_patches)` and
`custom_partitioner_fn`; with torch 2.13 also the settings of AOTAutograd's cache, and `cache_key_tag`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config

from memo_compile.codegen.scheduler.fusion import wait_for_matmuls
from memo_compile.codegen.scheduler.lost_dependencies import Waits, added_waits, restored
from memo_compile.codegen.scheduler.order import (
    place_transfers,
    planned_steps,
)
from memo_compile.options import Options
from memo_compile.planning.decide import CarriedOut

Partition = Callable[[fx.GraphModule, Any, int, "list[int] | None"], tuple[fx.GraphModule, fx.GraphModule]]


def through_inductor(
    partition: Partition,
    inner: Callable[..., Any],
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    *,
    key: str | None = None,
    loaded: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: Inductor calls `partition` with the joint graph, and `inner` with each of the two.

    Args:
        key: what of the cache's key is not torch's; None to read and keep nothing.
        loaded: called in place of both for what the cache has, as `codegen.caching.code.PlannedCode` says.
    """
    from torch._inductor import list_mode_options  # loads Inductor
    from torch._inductor.compile_fx import compile_fx

    from memo_compile.codegen.caching.code import Partitioner  # loads Inductor

    patches: dict[str, Any] = {
        **(list_mode_options(options.mode) if options.mode else {}),
        **options.inductor,
        "custom_partitioner_fn": Partitioner(key or "", partition, loaded),
        # Reuse merges live ranges before memo sees them; partitions would cut the body in pieces.
        "allow_buffer_reuse": False,
        "graph_partition": False,
        # Inductor's own cache knows of no plans. AOTAutograd's asks whether it is on, and then goes without it.
        "fx_graph_cache": key is not None,
    }
    with functorch_config.patch(donated_buffer=False, force_non_lazy_backward_lowering=True), _cached(key):
        compiled: Any = compile_fx(gm, list(inputs), inner_compile=inner, config_patches=patches)
    return compiled


@contextlib.contextmanager
def _cached(key: str | None) -> Iterator[None]:
    """Within, AOTAutograd keeps what is compiled under its own key and this one, and looks for it there."""
    if key is None:
        with functorch_config.patch(enable_autograd_cache=False):
            yield
        return
    from memo_compile.codegen.caching.entries import only_whole_entries  # loads Inductor

    compiler: Any = torch.compiler.config
    tag = f"{compiler.cache_key_tag} memo {key}"
    with (
        functorch_config.patch(enable_autograd_cache=True, bundled_autograd_cache=True),
        compiler.patch(cache_key_tag=tag),
        only_whole_entries(),
    ):
        yield


def num_outputs(gm: fx.GraphModule) -> int:
    """How many results a Dynamo graph has."""
    (output,) = gm.graph.find_nodes(op="output")
    return len(output.args[0]) if isinstance(output.args[0], (tuple, list)) else 1


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Within, garbage is not collected: in graphs and symbols that takes a fifth of the time, and hardly frees any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def settings_for(decided: CarriedOut, graph: fx.GraphModule) -> Iterator[None]:
    """Matmuls and transfers stay where the plan has them: Inductor's own order for memory knows of no overlap."""
    from torch._inductor import config  # loads Inductor

    moves = any(h.offloaded for h in decided.residency.values())
    place = place_transfers(planned_steps(graph)) if moves else None
    waits: Waits = {}

    def before_fusion(nodes: list[Any]) -> list[Any]:
        nodes = wait_for_matmuls(nodes)
        waits.update(added_waits(nodes))
        return nodes

    def after_fusion(nodes: list[Any]) -> list[Any]:
        nodes = restored(nodes, waits)
        return place(nodes) if place is not None else nodes

    settings: dict[str, Any] = {}
    if decided.residency:
        settings["_pre_fusion_custom_pass"] = before_fusion
        settings["_post_fusion_custom_pass"] = after_fusion
    if moves:
        settings["reorder_for_peak_memory"] = False
    with config.patch(settings):
        yield
