"""`verify=True`: before the first step, planned and unplanned graph run on copies of its inputs, and are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from memo_compile.errors import VerificationFailed
from memo_compile.runtime.planning_again import one_compiles

# Of a tensor's norm, or of a thousandth of the largest norm: room for another order of summation, and no more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def verified(
    planned: Callable[..., Any], own: fx.GraphModule, plain: fx.GraphModule, backend: str
) -> Callable[..., Any]:
    """`planned`, whose first call is compared with `plain` under torch's own `backend`.

    Args:
        own: the graph that `planned` was made of, for parameters and buffers that are no arguments.
        plain: a copy of it, made before.

    Raises:
        VerificationFailed: a result, a gradient, or an input or a buffer as it was left differs by more than rounding.
    """
    checked = False

    def run(*args: Any) -> Any:
        nonlocal checked
        if not checked:
            checked = True
            compare(planned, _reference(plain, args, backend), args, _state(own), _state(plain))
        return planned(*args)

    return run


def _state(gm: fx.GraphModule) -> list[torch.Tensor]:
    return [*gm.parameters(), *gm.buffers()]


def _reference(plain: fx.GraphModule, args: Sequence[Any], backend: str) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend  # loads Dynamo

    with one_compiles():
        compiled: Callable[..., Any] = lookup_backend(backend)(plain, list(args))
    return compiled


@dataclass(frozen=True)
class _Observed:
    """What one run gave: results, gradients, and inputs and the graph's own state (buffers) as they were left.

    Each is a list in which a None, or a value that is no tensor, keeps its place.
    """

    outputs: list[Any]
    gradients: list[Any]
    inputs: list[Any]
    state: list[Any]


def compare(
    planned: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    planned_state: Sequence[torch.Tensor] = (),
    reference_state: Sequence[torch.Tensor] = (),
) -> None:
    """Run both on copies of `args` from the random state that there is now, which is restored.

    Args:
        planned_state, reference_state: what each reads and may update that is no argument; it is restored, too.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    observed = []
    for fn, state in ((reference, reference_state), (planned, planned_state)):
        before = [s.detach().clone() for s in state]
        with torch.random.fork_rng(devices):
            observed.append(_observe(fn, args, state))
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
    expected, got = observed
    for kind in ("outputs", "gradients", "inputs", "state"):
        _check(kind, getattr(got, kind), getattr(expected, kind))


def _observe(fn: Callable[..., Any], args: Sequence[Any], state: Sequence[torch.Tensor]) -> _Observed:
    copies = [_copy(a) for a in args]
    outputs = list(fn(*copies))
    wanted = [c for c in (*copies, *state) if isinstance(c, torch.Tensor) and c.requires_grad]
    roots = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    gradients: list[Any] = []
    if roots and torch.is_grad_enabled():
        # Not all ones, which a sum over the wrong rows would not be seen by.
        tangents = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).to(o.dtype).view_as(o) for o in roots]
        gradients = list(torch.autograd.grad(roots, wanted, tangents, allow_unused=True))
    after = [c.detach() for c in copies if isinstance(c, torch.Tensor)]
    results = [o.detach() if isinstance(o, torch.Tensor) else o for o in outputs]
    return _Observed(outputs=results, gradients=gradients, inputs=after, state=[s.detach().clone() for s in state])


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _check(kind: str, got: Sequence[Any], expected: Sequence[Any]) -> None:
    if len(got) != len(expected):
        raise VerificationFailed(f"the planned graph gives {len(got)} {kind}, the unplanned one {len(expected)}")
    floating = [e for e in expected if isinstance(e, torch.Tensor) and e.is_floating_point()]
    largest = max((float(e.double().norm()) for e in floating), default=0.0)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if _described(a) != _described(b):
            raise VerificationFailed(
                f"{kind}[{i}] is {_described(a)}, and that of the unplanned graph {_described(b)}. Please report this "
                "with a dump (dump=...)."
            )
        if isinstance(b, torch.Tensor):
            _check_values(f"{kind}[{i}]", a, b, largest)


def _described(value: Any) -> str:
    """What must be alike whatever the rounding."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return repr(value) if value is None or isinstance(value, (int, float, bool)) else type(value).__name__


def _check_values(name: str, got: torch.Tensor, expected: torch.Tensor, largest: float) -> None:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    difference = float((got.to(wide) - expected.to(wide)).norm())
    allowed = TOLERANCE.get(expected.dtype, 0.0) * max(float(expected.to(wide).norm()), 1e-3 * largest)
    if not difference <= allowed:
        raise VerificationFailed(
            f"{name} of shape {tuple(expected.shape)} differs from the unplanned graph by {difference:.3e} in norm, "
            f"where {allowed:.3e} is rounding. Please report this with a dump (dump=...)."
        )
