"""The functions that users call, beside `torch.compile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memo_compile.registry import registry
from memo_compile.schema import Plan


def plans() -> list[Plan]:
    """The plans that this process has compiled, newest last: the latest 512 since `reset`.

    Those of `memo_compile.plan` and `memo_compile.explain` are not among them.
    """
    return list(registry().plans)


def reset() -> None:
    """Forget all plans and free all that memo holds; what a call still holds is freed when the call lets go.

    Host memory that a CUDA graph has captured stays until the process ends: its replays copy there.
    """
    from memo_compile.runtime.ops import pool  # loads torch

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
        model: a module or function. All its results that need a gradient are given one: none is taken for the loss.
        args, kwargs: real or fake inputs; only shapes, dtypes and devices are read.
        options: those of the backend. Nothing is dumped; `memo_compile.explain` does that.

    Returns:
        The plan of the one graph. Bytes are those of the graph as memo expects it to be fused. Arena bytes, lower bound
        and coverage are 0, and there are no buffers: they come from emitted code.

    Raises:
        MemoError: the model does not trace into one graph, or a mistake in the options.
    """
    from memo_compile.trace.offline import plan_offline  # loads torch

    if isinstance(options, Mapping):  # anything else is refused with the backend's message
        options = {key: value for key, value in options.items() if key != "dump"}
    return plan_offline(model, tuple(args), dict(kwargs or {}), options)
