"""The functions that users call, beside `torch.compile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

from memo_compile.errors import NoLoss
from memo_compile.registry import registry
from memo_compile.schema import Plan

M = TypeVar("M")


def loss_only(model: M) -> M:
    """Let a model return its loss alone in training: what else it returns has to be held whole until the step ends.

    Logits, one number a token and word, are the largest of these; where nothing returns them, they can be made, used
    and dropped by tiles (the option `tiles`). Evaluation, `model.eval()`, returns all as before. Call this before the
    model is compiled.

    Args:
        model: a module whose `forward` returns a mapping with a "loss", such as Hugging Face's models do when they are
            given labels, or a tuple that begins with the loss.

    Returns:
        The same model; its `forward` is changed.

    Raises:
        NoLoss: when the model is called in training and returns something else.
    """
    changed: Any = model
    forward = changed.forward

    @wraps(forward)
    def loss_of(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        return _without_the_rest(result) if changed.training else result

    changed.forward = loss_of
    return model


def _without_the_rest(result: Any) -> Any:
    if isinstance(result, Mapping) and result.get("loss") is not None:
        kind: Any = type(result)
        return kind(loss=result["loss"])
    if isinstance(result, tuple) and result and getattr(result[0], "ndim", None) == 0:
        return result[:1]
    raise NoLoss(type(result).__name__)


def sequence_parallel(model: M, mesh: Any, options: Mapping[str, Any] | None = None, backend: str = "memo") -> M:
    """Compile a model so that the ranks of a mesh share its tokens out (DeepSpeed-Ulysses, arXiv 2309.14509).

    Each rank is given the whole batch, (batch, tokens), and holds a part of the activations: what goes token by token
    is computed for this rank's tokens, attention for its heads. Losses are those of all tokens, and gradients of
    parameters are summed over the ranks within the step: every rank has those of one process.

    Args:
        model: a module whose attention is `torch.nn.functional.scaled_dot_product_attention` without dropout. Its
            parameters are the same on all ranks.
        mesh: a `torch.distributed.device_mesh.DeviceMesh` of one dimension. Tokens and heads of queries are multiples
            of its size; heads of keys and values too, or they divide it.
        options: memo's, a budget among them.
        backend: "memo" or "memo_eager".

    Returns:
        The same model, compiled in place.

    Raises:
        NotShareable: in the first step, at an op that reads other tokens in another way.
    """
    compiled: Any = model
    group = mesh.get_group().group_name
    compiled.compile(backend=backend, options={**(options or {}), "sequence_parallel": group})
    return model


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
