"""DDP's buckets: torch cuts a graph where DDP fills its buckets, and a budget would hold for none of the pieces.

Each piece would be planned as if it were alone, before the others are known. So where a budget is asked for the graph
stays whole. DDP's all-reduces then start when the backward has run, not in it.

Private torch APIs, tried with torch 2.13: `DDPOptimizer.compile_fn` (`torch/_dynamo/backends/distributed.py`), which
calls a backend once for each piece and for other backends is as before; `_torchdynamo_orig_backend`, by which Dynamo
wraps a backend, and `compiler_fn` and `kwargs` of what `torch.compile` makes of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from memo_compile.logs import logger

log = logger("memo_compile")

Wants = Callable[[Any, Mapping[str, Any], Sequence[Any]], bool]


def keep_whole(wants: Wants) -> None:
    """From now on a graph stays whole where `wants` says so: of a backend, its arguments, and the graph's inputs."""
    import torch.distributed as dist  # not in every build of torch

    if not dist.is_available():
        return
    from torch._dynamo.backends.distributed import DDPOptimizer  # loads Dynamo

    DDPOptimizer.compile_fn = _whole(DDPOptimizer.compile_fn, wants)  # type: ignore[method-assign]


def _whole(compile_fn: Any, wants: Wants) -> Any:
    @wraps(compile_fn)
    def run(optimizer: Any, gm: Any, inputs: Any, **rest: Any) -> Any:
        backend, arguments = unwrapped(optimizer.backend_compile_fn)
        if not wants(backend, arguments, inputs):
            return compile_fn(optimizer, gm, inputs, **rest)
        log.warning(
            "DistributedDataParallel: the graph is not cut into buckets, so that its budget holds for all of it. "
            "torch._dynamo.config.optimize_ddp = False says the same."
        )
        return optimizer.backend_compile_fn(gm, inputs, **rest)

    return run


def unwrapped(backend: Any) -> tuple[Any, Mapping[str, Any]]:
    """The function that is registered as a backend, and what `torch.compile` calls it with."""
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_fn", backend), getattr(backend, "kwargs", {})
