"""Graphs of which nothing is to be planned, as they are: symbolic sizes, reuse of buffers, caches and all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx

from memo_compile.options import Options


def with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """What `backend="inductor"` would make of the graph, with the mode and the patches that memo was given."""
    from torch._inductor import list_mode_options  # loads Inductor
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(options.mode) if options.mode else {}), **options.inductor}
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    called: Callable[..., Any] = compiled
    return called


def op_by_op(gm: fx.GraphModule, inputs: Sequence[Any], _: Options) -> Callable[..., Any]:
    """What `backend="aot_eager"` would make of the graph."""
    from torch._dynamo.backends.registry import lookup_backend  # loads Dynamo

    compiled: Callable[..., Any] = lookup_backend("aot_eager")(gm, list(inputs))
    return compiled
