"""`verify=True`: before the first step, planned and unplanned graph run on copies of its inputs, and are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from memo_compile.errors import VerificationFailed

# Of a tensor's norm, or of a thousandth of the largest norm: room for another order of summation, and no more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def verified(planned: Callable[..., Any], plain: fx.GraphModule, backend: str) -> Callable[..., Any]:
    """`planned`, whose first call is compared with `plain` under torch's own `backend`.

    Raises:
        VerificationFailed: an output or a gradient differs by more than rounding.
    """
    checked = False

    def run(*args: Any) -> Any:
        nonlocal checked
        if not checked:
            checked = True
            compare(planned, _reference(plain, args, backend), args)
        return planned(*args)

    return run


def _reference(plain: fx.GraphModule, args: Sequence[Any], backend: str) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend  # loads Dynamo

    compiled: Callable[..., Any] = lookup_backend(backend)(plain, list(args))
    return compiled


@dataclass(frozen=True)
class _Observed:
    """What one run gave: outputs and gradients of inputs, and inputs as they were left."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor]
    inputs: list[torch.Tensor]


def compare(planned: Callable[..., Any], reference: Callable[..., Any], args: Sequence[Any]) -> None:
    """Run both on copies of `args` from the random state that there is now, which is restored."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        expected = _observe(reference, args)
    with torch.random.fork_rng(devices):
        got = _observe(planned, args)
    for kind in ("outputs", "gradients", "inputs"):
        _check(kind, getattr(got, kind), getattr(expected, kind))


def _observe(fn: Callable[..., Any], args: Sequence[Any]) -> _Observed:
    copies = [_copy(a) for a in args]
    results = fn(*copies)
    outputs = [r for r in results if isinstance(r, torch.Tensor)]
    wanted = [c for c in copies if isinstance(c, torch.Tensor) and c.requires_grad]
    roots = [o for o in outputs if o.requires_grad]
    gradients: list[torch.Tensor] = []
    if roots and torch.is_grad_enabled():
        # Not all ones, which a sum over the wrong rows would not be seen by.
        tangents = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).to(o.dtype).view_as(o) for o in roots]
        found = torch.autograd.grad(roots, wanted, tangents, allow_unused=True)
        gradients = [g for g in found if g is not None]
    left = [c.detach() for c in copies if isinstance(c, torch.Tensor)]
    return _Observed([o.detach() for o in outputs], gradients, left)


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _check(kind: str, got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    if len(got) != len(expected):
        raise VerificationFailed(f"the planned graph gives {len(got)} {kind}, the unplanned one {len(expected)}")
    floating = [e for e in expected if e.is_floating_point()]
    largest = max((float(e.double().norm()) for e in floating), default=0.0)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        difference = float((a.double() - b.double()).norm())
        allowed = TOLERANCE.get(b.dtype, 0.0) * max(float(b.double().norm()), 1e-3 * largest)
        if not difference <= allowed:
            raise VerificationFailed(
                f"{kind}[{i}] of shape {tuple(b.shape)} differs from the unplanned graph by {difference:.3e} in norm, "
                f"where {allowed:.3e} is rounding. Please report this with a dump (dump=...)."
            )
