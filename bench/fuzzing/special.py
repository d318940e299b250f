"""Layers of what a compiler treats apart: regions, branches, checkpoints, custom ops and functions, collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.utils.checkpoint

Made = tuple[Callable[..., nn.Module], Mapping[str, tuple[Any, ...]]]


@cache
def library() -> torch.library.Library:
    """The custom ops: one that is differentiable, one that mutates, one that does both.

    torch itself refuses those that return a view of their input.
    """
    made = torch.library.Library("fuzzing", "DEF")
    made.define("scaled(Tensor x, float by) -> Tensor")
    made.define("double_(Tensor(a!) x) -> ()")
    made.define("scaled_into_(Tensor x, Tensor(a!) out) -> Tensor")
    made.impl("scaled", lambda x, by: x * by, "CompositeExplicitAutograd")
    made.impl("double_", lambda x: (x.mul_(2.0), None)[1], "CompositeExplicitAutograd")
    made.impl("scaled_into_", lambda x, out: (out.copy_(x * 3), x + 1)[1], "CompositeExplicitAutograd")
    torch.library.register_fake("fuzzing::scaled", lambda x, by: torch.empty_like(x), lib=made)
    torch.library.register_fake("fuzzing::double_", lambda x: None, lib=made)
    torch.library.register_fake("fuzzing::scaled_into_", lambda x, out: torch.empty_like(x), lib=made)
    torch.library.register_autograd(
        "fuzzing::scaled",
        lambda ctx, grad: (torch.ops.fuzzing.scaled(grad, ctx.by), None),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "by", inputs[1]),
        lib=made,
    )
    return made


@cache
def group() -> str:
    """The name of a process group of this process alone."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    name: str = dist.group.WORLD.group_name  # type: ignore[union-attr]
    return name


class Custom(nn.Module):
    """Custom ops."""

    def __init__(self, width: int, tokens: int, how: str) -> None:
        super().__init__()
        library()
        self.how, self.linear = how, nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, ops = self.linear(x), torch.ops.fuzzing
        if self.how == "functional":
            return ops.scaled(y.sin(), 0.5) * y
        if self.how == "mutating":
            early, z = y.cos(), y.detach().clone()
            ops.double_(z)
            return y.sin() + z * early
        if self.how == "mutating an operand of another":
            z = y.detach() * 1.0
            w = z.exp().tanh()
            ops.double_(z)
            return y * w + z.sin()
        z = torch.empty_like(y.detach())
        more = ops.scaled_into_(y.detach(), z)
        return y * more.tanh() + z.cos()


class _Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: float) -> torch.Tensor:
        e = x.exp()
        ctx.save_for_backward(x, e)
        ctx.by = by
        return e * by

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, e = ctx.saved_tensors
        return grads[0] * e * ctx.by + 0 * x, None


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class _Passed(torch.autograd.Function):
    """Its output is its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 0.5


class Function(nn.Module):
    """Autograd functions of the user's own."""

    def __init__(self, width: int, tokens: int, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).tanh()
        if self.how == "saving":
            return _Saving.apply(y, 0.7)
        return x + (_Straight.apply(y * 4) / 4 if self.how == "straight through" else _Passed.apply(y).sin())


class Collective(nn.Module):
    """Functional collectives of one process, with work between start and wait."""

    def __init__(self, width: int, tokens: int, how: str) -> None:
        super().__init__()
        self.group, self.how, self.linear = group(), how, nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, ops = self.linear(x), torch.ops._c10d_functional
        sent = y.detach().sin()
        if self.how == "reduced":
            started = ops.all_reduce(sent, "sum", self.group)
        elif self.how == "gathered":
            started = ops.all_gather_into_tensor(sent, 1, self.group)
        else:
            started = ops.all_to_all_single(sent, [sent.shape[0]], [sent.shape[0]], self.group)
        beside = (y @ self.linear.weight).tanh()
        return beside + ops.wait_tensor(started) * y


class Broken(nn.Module):
    """A graph break."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).tanh()
        torch._dynamo.graph_break()
        return y + x


class Region(nn.Module):
    """A nested region, called once or several times; its output may be its input."""

    def __init__(self, width: int, tokens: int, inner: nn.Module, calls: int, last: str) -> None:
        super().__init__()
        self.inner, self.calls, self.last = inner, calls, last

        @torch.compiler.nested_compile_region
        def region(x: torch.Tensor) -> torch.Tensor:
            y = inner(x)
            return y if last == "as it is" else y.sin() * x

        self.region: Callable[[torch.Tensor], torch.Tensor] = region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls):
            x = self.region(x).tanh()
        return x


class Branch(nn.Module):
    """`torch.cond` on what the data say."""

    def __init__(self, width: int, tokens: int, inner: nn.Module, other: str) -> None:
        super().__init__()
        self.inner, self.other = inner, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = x.detach().mean() > 0
        other = torch.sin if self.other == "sine" else torch.clone
        if torch.compiler.is_dynamo_compiling():
            # Both results must be laid out alike, and be no view of what is given.
            result: torch.Tensor = torch.cond(taken, lambda y: _anew(self.inner(y)), lambda y: _anew(other(y)), (x,))
            return result
        return self.inner(x) if bool(taken) else other(x)


def _anew(y: torch.Tensor) -> torch.Tensor:
    return (y * 1.0).contiguous()


class Checkpointed(nn.Module):
    """A checkpoint of the user's own."""

    def __init__(self, width: int, tokens: int, inner: nn.Module, calls: int) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls):
            x = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
        return x


class Again(nn.Module):
    """The same layers several times, with what came before added."""

    def __init__(self, width: int, tokens: int, inner: nn.Module, calls: int) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for _ in range(self.calls):
            x = self.inner(x).tanh() + first
        return x


SPECIAL: Mapping[str, Made] = {
    "custom op": (
        Custom,
        {"how": ("functional", "mutating", "mutating an operand of another", "into")},
    ),
    "function": (Function, {"how": ("saving", "straight through", "passed")}),
    "collective": (Collective, {"how": ("reduced", "gathered", "exchanged")}),
    "graph break": (Broken, {}),
}
WRAPPING: Mapping[str, Made] = {
    "region": (Region, {"calls": (1, 2, 3), "last": ("as it is", "product")}),
    "branch": (Branch, {"other": ("sine", "same")}),
    "checkpoint": (Checkpointed, {"calls": (1, 2)}),
    "again": (Again, {"calls": (2, 3)}),
}
