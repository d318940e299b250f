"""The functions that users call, beside `torch.compile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memo_compile.registry import registry
from memo_compile.schema import Plan


def plans() -> list[Plan]:
    """The plans that this process has made, newest last."""
    return list(registry().plans)


def empty_cache() -> None:
    """Give idle host blocks back to the system, and idle device memory where a GPU is in use."""
    import torch

    from memo_compile.runtime.ops import pool

    pool().drop_idle()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset() -> None:
    """Forget all plans and free all that memo holds; what a call still holds is freed when the call lets go."""
    from memo_compile.runtime.ops import pool

    registry().clear()
    pool().reset()


def plan(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a training step of `model(*args, **kwargs)` on fake tensors: nothing is allocated, nothing is run.

    Args:
        model: a module or function; its result, or the first tensor in it, is taken for the loss.
        args, kwargs: real or fake inputs; only shapes, dtypes and devices are read.
        options: those of the backend.

    Returns:
        The plan of the one graph. Bytes are those of the graph as memo expects it to be fused.

    Raises:
        MemoError: the model does not trace into one graph, or a mistake in the options.
    """
    from memo_compile.offline import plan_offline

    return plan_offline(model, tuple(args), dict(kwargs or {}), options)
