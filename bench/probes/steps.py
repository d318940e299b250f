"""Probes of whole steps: dropout's masks, CUDA graphs, memory near the limit, lengths in turn, what is page-locked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import memo_compile
from bench.models import head_of, make_model
from bench.peers import Run, Trained
from bench.probes.timing import GIB, Answer, Scene, on_cuda, pinned_by_torch, timed
from memo_compile.errors import MemoError
from memo_compile.models import Llama, LlamaConfig
from memo_compile.runtime.ops import pool

K = 1024


def dropout(scene: Scene) -> Answer:
    """Dropout after a transposed input (pytorch#198333): is the mask random, and the same in the backward?

    By torch alone, and by memo with all that can be recomputed recomputed. `same_mask` compares where the result and
    where the gradient is not 0; `groups_alike` is the share of groups of four equal bits, 0.125 for independent ones.
    """
    ways: dict[str, dict[str, Any]] = {scene.plain: {"backend": scene.plain}}
    for budget in ("min", 0.5):
        ways[f"memo at {budget}"] = {
            "backend": scene.backend,
            "options": {"memory_budget": budget, "offload": False},
        }
    return {name: said(lambda way=way: _mask(scene, way)) for name, way in ways.items()}  # type: ignore[misc]


def _mask(scene: Scene, way: dict[str, Any]) -> Answer:
    def fn(x: Tensor) -> Tensor:
        return F.dropout(torch.cos(x).t(), 0.5, True)

    torch._dynamo.reset()
    x = torch.ones(scene.size(4096), 2048, device=scene.device, requires_grad=True)
    y = torch.compile(fn, **way)(x)
    y.sum().backward()
    assert x.grad is not None
    mask = y != 0
    groups = [m.reshape(-1, 4).float().sum(1) for m in (mask, mask.t())]
    return {
        "share": mask.float().mean().item(),
        "same_mask": bool(torch.equal(mask, x.grad.t() != 0)),
        "groups_alike": [(g % 4 == 0).float().mean().item() for g in groups],
    }


_SMALL = LlamaConfig(vocab=512, layers=2, width=512, heads=8, kv_heads=4, ffn=1376)
_TINY = LlamaConfig(vocab=64, layers=1, width=32, heads=4, kv_heads=2, ffn=96)


def _small_model(scene: Scene) -> Llama:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Llama(_TINY if scene.tiny else _SMALL).to(scene.device)


def _tokens(scene: Scene, model: Llama, count: int) -> Tensor:
    return torch.randint(0, model.config.vocab, (1, count), device=scene.device)


def _small_step(scene: Scene, options: dict[str, Any], mode: str | None = None) -> tuple[Callable[[], Tensor], Llama]:
    """A step of a small model by memo, which leaves gradients, and the model."""
    model = _small_model(scene)
    x = _tokens(scene, model, scene.size(4096))
    chosen: dict[str, Any] = {"mode": mode} if mode else {}
    compiled = torch.compile(model, backend=scene.backend, options=options | chosen, dynamic=False)

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss: Tensor = compiled(x, labels=x)
        loss.backward()
        return loss

    return step, model


def _gradients(model: Llama) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def graphs(scene: Scene) -> Answer:
    """CUDA graphs of a step that offloads: by `mode="reduce-overhead"`, captured by hand, and `reset()` meanwhile.

    Figures are relative distances of gradients from those of the step run without a graph.
    """
    on_cuda(scene)
    step, model = _small_step(scene, {"memory_budget": 0.5})
    for _ in range(2):
        step()
    wanted = _gradients(model).clone()

    def off(model: Llama) -> float:
        return ((_gradients(model) - wanted).norm() / wanted.norm()).item()

    answer: Answer = {"offloaded_bytes": memo_compile.plans()[-1].offloaded_bytes}
    answer["by hand"] = said(lambda: _captured(step, lambda: off(model)))
    memo_compile.reset()
    replayed, other = _small_step(scene, {"memory_budget": 0.5}, "reduce-overhead")

    def reduced() -> float:
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            replayed()
        return off(other)

    answer["reduce-overhead"] = said(reduced)
    memo_compile.reset()  # its graphs live on
    answer["reduce-overhead after reset"] = said(reduced)
    return answer


def _captured(step: Callable[[], Tensor], off: Callable[[], float]) -> Answer:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    answer: Answer = {}
    for name in ("replayed", "after reset"):
        graph.replay()
        torch.cuda.synchronize()
        answer[name] = off()
        memo_compile.reset()
    return answer


def said(fn: Callable[[], Any]) -> Any:
    """What it answers, or what it refuses with: either is an answer here."""
    try:
        return fn()
    except (RuntimeError, MemoError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def wide_step(make: Callable[[Any], Run], layers: int, tokens: int, scene: Scene) -> Callable[[], None]:
    """A step of a model as wide as Llama-8B, which drops its gradients."""
    torch._dynamo.reset()
    memo_compile.reset()
    trained: Any = make_model("llama-8b", layers, tokens, scene.device, scene.tiny)
    x = torch.randint(0, head_of(trained).weight.shape[0], (1, tokens), device=scene.device)
    run = make(trained)

    def step() -> None:
        run(x, x).backward()
        trained.zero_grad(set_to_none=True)

    return step


def by_memo(scene: Scene, **options: Any) -> Callable[[Trained], Run]:
    """memo with options."""
    return lambda trained: torch.compile(trained, backend=scene.backend, options=options, dynamic=False)


def prefetch_buffers(scene: Scene) -> Answer:
    """Does a step near the device's limit make the allocator wait or try again?

    A step with a budget of half is run with all memory, and with no more than what it reserved then and 2 %.
    """
    on_cuda(scene)
    step = wide_step(by_memo(scene, memory_budget=0.5), 2, 32 * K, scene)
    step()
    answer: Answer = {}
    everything = torch.cuda.get_device_properties(0).total_memory
    for name, share in (("all memory", 1.0), ("just enough", 0.0)):
        torch.cuda.empty_cache()
        limit = share or 1.02 * answer["all memory"]["reserved"] / everything
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit))
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        step()
        seconds = [timed(step) for _ in range(3)]
        stats = torch.cuda.memory_stats()
        counts = {key: stats.get(key, 0) for key in ("num_alloc_retries", "num_sync_all_streams", "num_ooms")}
        answer[name] = {"step_s": min(seconds), "reserved": torch.cuda.max_memory_reserved(), **counts}
    return answer


def lengths(scene: Scene) -> Answer:
    """Two lengths that take turns: seconds of a step, beside a length that repeats, and what the host holds."""
    step: dict[int, Callable[[], Any]] = {}
    model = _small_model(scene)
    options = {"memory_budget": 0.5, "lengths": "exact"}
    compiled = torch.compile(model, backend=scene.backend, options=options, dynamic=False)
    for tokens in (scene.size(16 * K), scene.size(12 * K)):
        x = _tokens(scene, model, tokens)
        step[tokens] = lambda x=x: compiled(x, labels=x).backward()  # type: ignore[misc]
        step[tokens]()
    long, short = step.values()
    answer: Answer = {"host_GiB_after_both": pool().held_bytes / GIB}
    for name, order in (("repeated", (long, long, long, short, short, short)), ("in turns", (long, short) * 3)):
        seconds = [(one, timed(one, scene)) for one in order]
        answer[name] = {
            "long_s": min(s for one, s in seconds if one is long),
            "short_s": min(s for one, s in seconds if one is short),
        }
    answer["host_GiB_at_the_end"] = pool().held_bytes / GIB
    return answer


def pinned(scene: Scene) -> Answer:
    """Bytes in memo's blocks, and at most in torch's own page-locked ones, after each part of a step of 256K tokens.

    A row of this length found 8 GiB more than planned; whose they are, and since when, tells whom to ask.
    """
    tokens = scene.size(256 * K)
    answer: Answer = {}

    def note(what: str) -> None:
        scene.synchronize()
        answer[what] = {"memo": pool().held_bytes, "torch": pinned_by_torch()}

    torch._dynamo.reset()
    memo_compile.reset()
    trained: Any = make_model("llama-8b", 1, tokens, scene.device, scene.tiny)
    x = torch.randint(0, head_of(trained).weight.shape[0], (1, tokens), device=scene.device)
    run = by_memo(scene, offload="all")(trained)
    optimizer = torch.optim.AdamW(trained.parameters(), fused=not scene.tiny)
    note("before")
    for number in ("first", "second"):
        loss = run(x, x)
        note(f"{number} forward")
        loss.backward()
        note(f"{number} backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        note(f"{number} update")
    plans = memo_compile.plans()
    return {**answer, "planned": plans[-1].host_bytes, "plans": len(plans)}
