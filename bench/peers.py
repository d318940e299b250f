"""What a user would pick instead of memo: each peer makes a callable `(tokens, labels) -> loss` of the same model.

All of them share one loss, computed chunk by chunk, since whole logits would drown everything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memo_compile.models.llama import rotary_tables

Run = Callable[[Tensor, Tensor], Tensor]
CHUNK = 8192  # token rows whose logits exist at once
BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of activation_memory_budget


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T`; both gradients are made with the loss, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden: (tokens, width), weight: (vocabulary, width), labels: (tokens,), -100 for none."""
        count = (labels >= 0).sum()
        losses, hidden_grads = [], []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, hidden.shape[0], CHUNK):
            rows, wanted = hidden[begin : begin + CHUNK], labels[begin : begin + CHUNK]
            logits = (rows @ weight.t()).float()
            losses.append(F.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100))
            known = (wanted >= 0).unsqueeze(1)
            grad = torch.softmax(logits, 1)
            grad = grad.scatter_add(1, wanted.clamp(min=0).unsqueeze(1), -torch.ones_like(grad[:, :1]))
            grad = (grad * known / count).to(hidden.dtype)
            hidden_grads.append(grad @ weight)
            weight_grad = weight_grad + (grad.t() @ rows).float()
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad.to(weight.dtype))
        return torch.stack(losses).sum() / count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        """Gradients of the mean loss, times what comes in."""
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grads[0]
        return hidden_grad * scale.to(hidden_grad.dtype), weight_grad * scale.to(weight_grad.dtype), None


class Trained(nn.Module):
    """A reference model with the chunked loss; `wrap` runs each block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.wrap: Callable[..., Tensor] = lambda block, *args: block(*args)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: (1, tokens)."""
        hidden = _hidden(self.model, tokens, self.wrap)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        loss: Tensor = _ChunkedLoss.apply(hidden.flatten(0, 1), self.model.head.weight, shifted)
        return loss


def _hidden(model: Any, tokens: Tensor, wrap: Callable[..., Tensor]) -> Tensor:
    """What a reference model gives to its head, each block run by `wrap`."""
    x: Tensor = model.embedding(tokens)
    tables: tuple[Tensor, ...] = ()
    if getattr(model, "positions", None) is not None:
        x = x + model.positions.weight[: tokens.shape[1]]
    elif hasattr(model.config, "theta"):
        c = model.config
        tables = rotary_tables(tokens.shape[1], c.width // c.heads, c.theta, x)
    for block in model.blocks:
        x = wrap(block, x, *tables)
    result: Tensor = model.norm(x)
    return result


def eager(trained: Trained) -> Run:
    """As it is."""
    return trained


def checkpointed(trained: Trained) -> Run:
    """Every block checkpointed."""
    trained.wrap = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    return trained


def checkpointed_on_cpu(trained: Trained) -> Run:
    """Every block checkpointed, its input on the host: `torch.autograd.graph.save_on_cpu`."""

    def wrap(block: nn.Module, *args: Tensor) -> Tensor:
        pinned = args[0].device.type == "cuda"
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
            result: Tensor = checkpoint(block, *args, use_reentrant=False)
        return result

    trained.wrap = wrap
    return trained


def checkpointed_on_streams(trained: Trained) -> Run:
    """The same with copies on streams of their own, and each block's input fetched one block ahead."""
    mover = _LayerInputs()

    def wrap(block: nn.Module, *args: Tensor) -> Tensor:
        with mover.saving():
            result: Tensor = checkpoint(block, *args, use_reentrant=False)
        return result

    trained.wrap = wrap
    return trained


class _LayerInputs:
    """Saved-tensor hooks that copy to the host and back beside the computation; in place where there is no GPU."""

    def __init__(self) -> None:
        self._streams: tuple[Any, Any] | None = None
        self._order: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within, what autograd saves goes to the host."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, value: Tensor) -> Any:
        if value.device.type != "cuda" or (value.requires_grad and value.is_leaf):
            return value
        self._streams = self._streams or (torch.cuda.Stream(), torch.cuda.Stream())
        out = self._streams[0]
        out.wait_stream(torch.cuda.current_stream())
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        with torch.cuda.stream(out):
            host.copy_(value, non_blocking=True)
        value.record_stream(out)
        item: dict[str, Any] = {"host": host, "device": value.device}
        self._order.append(item)
        return item

    def _unpack(self, item: Any) -> Tensor:
        if isinstance(item, Tensor):
            return item
        self._fetch(item)
        place = next((i for i, other in enumerate(self._order) if other is item), 0)
        if place:
            self._fetch(self._order[place - 1])
        self._order = [other for other in self._order if other is not item]
        torch.cuda.current_stream().wait_event(item["done"])
        value: Tensor = item["value"]
        value.record_stream(torch.cuda.current_stream())
        return value

    def _fetch(self, item: dict[str, Any]) -> None:
        if "value" in item:
            return
        assert self._streams is not None
        out, back = self._streams
        back.wait_stream(out)
        with torch.cuda.stream(back):
            item["value"] = item["host"].to(item["device"], non_blocking=True)
            item["done"] = torch.cuda.Event()
            item["done"].record(back)


def inductor(trained: Trained) -> Run:
    """torch.compile as it is."""
    return torch.compile(trained, backend="inductor", dynamic=False)


def inductor_with_budget(budget: float) -> Callable[[Trained], Run]:
    """torch.compile with `activation_memory_budget`, for all that follows in this process."""

    def make(trained: Trained) -> Run:
        torch._functorch.config.activation_memory_budget = budget
        return inductor(trained)

    return make


def inductor_offloading(trained: Trained) -> Run:
    """torch.compile with its own activation offloading, for all that follows in this process.

    Raises:
        NotImplementedError: this torch has none.
    """
    config: Any = torch._functorch.config
    if not hasattr(config, "enable_activation_offloading"):
        raise NotImplementedError("this torch has no activation offloading at compile time")
    config.enable_activation_offloading = True
    config.activation_offload_separate_stream = torch.cuda.is_available()
    return inductor(trained)


def memo(**options: Any) -> Callable[[Trained], Run]:
    """memo with options."""
    return lambda trained: torch.compile(trained, backend="memo", options=options, dynamic=False)


PEERS: dict[str, Callable[[Trained], Run]] = {
    "eager": eager,
    "checkpoint": checkpointed,
    "checkpoint+save_on_cpu": checkpointed_on_cpu,
    "checkpoint+streams": checkpointed_on_streams,
    "inductor": inductor,
    **{f"inductor-budget-{b}": inductor_with_budget(b) for b in BUDGETS},
    "inductor-offload": inductor_offloading,
    "memo-auto": memo(),
    "memo-min": memo(memory_budget="min"),
}
AT = "memo@"  # memo within what another peer held: `memo@checkpoint`
