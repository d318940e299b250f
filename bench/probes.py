"""Questions to a CUDA card, each with a figure for an answer.

    python -m bench.probes NAME    # one line of JSON

`bench.device` asks them and stores the answers; a question that is settled stays, since another card may answer
otherwise.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import memo_compile
from bench.models import make_model
from bench.peers import inductor, memo
from memo_compile.errors import MemoError
from memo_compile.models import Llama, LlamaConfig
from memo_compile.runtime.ops import pool

GIB = 2**30
HUGE_PAGES, KEEP_FROM_CHILDREN, EMPTY_IN_CHILDREN = 14, 10, 18  # madvise's MADV_HUGEPAGE, _DONTFORK and _WIPEONFORK
Answer = dict[str, Any]


def _timed(fn: Callable[[], Any]) -> float:
    """Seconds until the device is done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _issued(fn: Callable[[], Any]) -> float:
    """Seconds until the processor is free again."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    fn()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds


def _locked(size: int, flags: int = mmap.MAP_SHARED, advice: Sequence[int] = ()) -> tuple[Tensor, float]:
    """An anonymous mapping that is page-locked, and the seconds that locking took. It stays until the process ends."""
    mapping = mmap.mmap(-1, size, flags=flags | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for kind in advice:
        if ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), kind):
            raise OSError(ctypes.get_errno(), "madvise")
    started = time.perf_counter()
    error = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    seconds = time.perf_counter() - started
    if error:
        raise OSError(error, "cudaHostRegister")
    return torch.frombuffer(mapping, dtype=torch.uint8), seconds


def link() -> Answer:
    """The link's GB/s each way, alone and both at once, and a series of products alone and beside both copies."""
    size = 2 * GIB
    (out, _), (back, _) = _locked(size), _locked(size)
    here, there = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            out.copy_(here, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            there.copy_(back, non_blocking=True)

    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    y = x @ x

    def products() -> None:
        for _ in range(50):
            torch.mm(x, x, out=y)

    def beside() -> None:
        both()
        products()

    for warm in (both, products):
        _timed(warm)
    return {
        "to_host_GBs": size / _timed(lambda: out.copy_(here, non_blocking=True)) / 1e9,
        "from_host_GBs": size / _timed(lambda: there.copy_(back, non_blocking=True)) / 1e9,
        "each_at_once_GBs": size / _timed(both) / 1e9,
        "products_s": _timed(products),
        "products_beside_copies_s": _timed(beside),
    }


def locking() -> Answer:
    """Seconds to page-lock 2 GiB of five kinds of memory, the last one memo's, and GB/s of a copy into each."""
    source = torch.zeros(2 * GIB, dtype=torch.uint8, device="cuda")
    kinds = {
        "shared": (mmap.MAP_SHARED, ()),
        "shared, huge pages advised": (mmap.MAP_SHARED, (HUGE_PAGES,)),
        "private": (mmap.MAP_PRIVATE, ()),
        "private, huge pages advised, kept from children": (mmap.MAP_PRIVATE, (HUGE_PAGES, KEEP_FROM_CHILDREN)),
        "private, huge pages advised, empty in children": (mmap.MAP_PRIVATE, (HUGE_PAGES, EMPTY_IN_CHILDREN)),
    }
    answer: Answer = {}
    for name, (flags, advice) in kinds.items():
        host, seconds = _locked(2 * GIB, flags, advice)
        host.copy_(source)
        rate = 2 * GIB / _timed(lambda host=host: host.copy_(source, non_blocking=True)) / 1e9  # type: ignore[misc]
        answer[name] = {"lock_s": seconds, "copy_GBs": rate}
    return answer


def pieces() -> Answer:
    """32 pieces of 8 MiB to the host: one by one, and as one two-dimensional copy."""
    heads, tokens, size = 32, 65536, 128
    source = torch.zeros(heads, tokens, size, dtype=torch.bfloat16, device="cuda")
    half = tokens // 2
    host, _ = _locked(heads * half * size * 2)
    there = host.view(torch.bfloat16).view(heads, half, size)
    runtime = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '0').split('.')[0]}")

    def one_by_one() -> None:
        for head in range(heads):
            there[head].copy_(source[head, :half], non_blocking=True)

    def at_once() -> None:
        row, wide = ctypes.c_size_t(half * size * 2), ctypes.c_size_t(tokens * size * 2)
        to_host, stream = 2, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        ends = ctypes.c_void_p(there.data_ptr()), row, ctypes.c_void_p(source.data_ptr()), wide
        if runtime.cudaMemcpy2DAsync(*ends, row, ctypes.c_size_t(heads), to_host, stream):
            raise OSError("cudaMemcpy2DAsync")

    answer = {}
    for name, copy in (("one_by_one", one_by_one), ("at_once", at_once)):
        _timed(copy)
        answer[name] = {"device_s": _timed(copy), "processor_s": _issued(copy)}
    return answer


def pins() -> Answer:
    """Bytes that torch itself has page-locked after each kind of copy between memo's memory and the device."""
    source = torch.zeros(8, 1024, 1024, 64, dtype=torch.uint8, device="cuda")
    host, _ = _locked(source.numel())
    strided = source[:, :512]
    half = host[: strided.numel()].view(strided.shape)
    whole, pageable = host.view(source.shape), torch.empty(source.shape, dtype=torch.uint8)
    copies: dict[str, tuple[Tensor, Tensor]] = {
        "dense": (whole, source),
        "strided": (half, strided),
        "pageable": (pageable, source),
    }
    answer: Answer = {}
    for name, (there, here) in copies.items():
        there.copy_(here, non_blocking=True)
        here.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        answer[name] = int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
    return answer


def dropout() -> Answer:
    """Dropout behind a transposed input (pytorch#198333): is the mask random, and the same in the backward?

    By Inductor, and by memo with all that can be recomputed recomputed. `same_mask` compares where the result and
    where the gradient is not 0; `groups_alike` is the share of groups of four equal bits, 0.125 for independent ones.
    """

    def fn(x: Tensor) -> Tensor:
        return F.dropout(torch.cos(x).t(), 0.5, True)

    answer: Answer = {}
    runs: dict[str, dict[str, Any]] = {
        "inductor": {"backend": "inductor"},
        **{
            f"memo at {budget}": {"backend": "memo", "options": {"memory_budget": budget, "offload": False}}
            for budget in ("min", 0.5)
        },
    }
    for name, options in runs.items():
        torch._dynamo.reset()
        x = torch.ones(4096, 2048, device="cuda", requires_grad=True)
        try:
            y = torch.compile(fn, **options)(x)
        except (MemoError, RuntimeError) as error:
            answer[name] = {"refused": str(error)[:200]}
            continue
        y.sum().backward()
        assert x.grad is not None
        mask = y != 0
        groups = [m.reshape(-1, 4).float().sum(1) for m in (mask, mask.t())]
        answer[name] = {
            "share": mask.float().mean().item(),
            "same_mask": bool(torch.equal(mask, x.grad.t() != 0)),
            "groups_alike": [(g % 4 == 0).float().mean().item() for g in groups],
        }
    return answer


_SMALL = LlamaConfig(vocab=512, layers=2, width=512, heads=8, kv_heads=4, ffn=1376)


def _small_step(options: dict[str, Any], mode: str | None = None) -> tuple[Callable[[], Tensor], Llama]:
    """A step of a small model by memo, which leaves gradients, and the model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Llama(_SMALL).cuda()
    x = torch.randint(0, _SMALL.vocab, (1, 4096), device="cuda")
    chosen: dict[str, Any] = {"mode": mode} if mode else {}
    compiled = torch.compile(model, backend="memo", options=options | chosen, dynamic=False)

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss: Tensor = compiled(x, labels=x)
        loss.backward()
        return loss

    return step, model


def _gradients(model: Llama) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def graphs() -> Answer:
    """CUDA graphs of a step that offloads: by `mode="reduce-overhead"`, captured by hand, and `reset()` meanwhile.

    Figures are relative distances of gradients from those of the step run without a graph.
    """
    step, model = _small_step({"memory_budget": 0.5})
    for _ in range(2):
        step()
    wanted = _gradients(model).clone()

    def off(model: Llama) -> float:
        return ((_gradients(model) - wanted).norm() / wanted.norm()).item()

    answer: Answer = {"offloaded_bytes": memo_compile.plans()[-1].offloaded_bytes}
    answer["by hand"] = _said(lambda: _captured(step, lambda: off(model)))
    memo_compile.reset()
    again, other = _small_step({"memory_budget": 0.5}, "reduce-overhead")

    def reduced() -> float:
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            again()
        return off(other)

    answer["reduce-overhead"] = _said(reduced)
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


def _said(fn: Callable[[], Any]) -> Any:
    """What it answers, or what it refuses with: either is an answer here."""
    try:
        return fn()
    except (RuntimeError, MemoError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def landings() -> Answer:
    """Does a step near the device's limit make the allocator wait or try again?

    A step with a budget of half is run with all memory, and with no more than what it reserved then and 2 %.
    """
    step = _wide_step(memo(memory_budget=0.5), 2, 32768)
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
        seconds = [_timed(step) for _ in range(3)]
        stats = torch.cuda.memory_stats()
        counts = {key: stats.get(key, 0) for key in ("num_alloc_retries", "num_sync_all_streams", "num_ooms")}
        answer[name] = {"step_s": min(seconds), "reserved": torch.cuda.max_memory_reserved(), **counts}
    return answer


def _wide_step(make: Callable[[Any], Any], layers: int, tokens: int) -> Callable[[], Any]:
    torch._dynamo.reset()
    memo_compile.reset()
    trained = make_model("llama-8b", layers, tokens, "cuda")
    x = torch.randint(0, 128256, (1, tokens), device="cuda")
    run = make(trained)

    def step() -> None:
        run(x, x).backward()
        trained.zero_grad(set_to_none=True)

    return step


def lengths() -> Answer:
    """Two lengths that take turns: seconds of a step, beside a length that repeats, and what the host holds."""
    step: dict[int, Callable[[], Any]] = {}
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Llama(_SMALL).cuda()
    compiled = torch.compile(model, backend="memo", options={"memory_budget": 0.5}, dynamic=False)
    for tokens in (16384, 12288):
        x = torch.randint(0, _SMALL.vocab, (1, tokens), device="cuda")
        step[tokens] = lambda x=x: compiled(x, labels=x).backward()  # type: ignore[misc]
        step[tokens]()
    long, short = step.values()
    answer: Answer = {"host_GiB_after_both": pool().held_bytes / GIB}
    for name, order in (("repeated", (long, long, long, short, short, short)), ("in turns", (long, short) * 3)):
        seconds = [(one, _timed(one)) for one in order]
        answer[name] = {
            "long_s": min(s for one, s in seconds if one is long),
            "short_s": min(s for one, s in seconds if one is short),
        }
    answer["host_GiB_at_the_end"] = pool().held_bytes / GIB
    return answer


KINDS_OF_KERNELS = {
    "copies": ("memcpy", "memset"),
    "attention": ("fmha", "flash", "attention", "cudnn_generated"),
    "matmuls": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "fused": ("triton",),
}


def step() -> Answer:
    """A step of a wide model of two layers at 8K tokens: kernels by kind, gaps, and how long issuing it takes.

    By Inductor, by memo with room for all, and by memo with half. Milliseconds; `gaps` is when no kernel ran.
    """
    answer: Answer = {}
    makes = {"inductor": inductor, "memo-auto": memo(), "memo-0.5": memo(memory_budget=0.5)}
    for name, make in makes.items():
        run = _wide_step(make, 2, 8192)
        for _ in range(3):
            run()
        answer[name] = {"issued": 1e3 * min(_issued(run) for _ in range(3)), **_kernels(run)}
    return answer


def _kernels(run: Callable[[], Any]) -> Answer:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if "CUDA" in str(e.device_type)]
    spans = sorted((e.time_range.start, e.time_range.end, _kind(e.name)) for e in events)
    by_kind: Answer = dict.fromkeys((*KINDS_OF_KERNELS, "other"), 0.0)
    for start, end, kind in spans:
        by_kind[kind] += (end - start) / 1e3
    kernels = [(start, end) for start, end, kind in spans if kind != "copies"]
    return {"kernels": len(kernels), **by_kind, "gaps": _gaps(kernels) / 1e3}


def _kind(name: str) -> str:
    low = name.lower()
    return next((kind for kind, words in KINDS_OF_KERNELS.items() if any(word in low for word in words)), "other")


def _gaps(spans: Sequence[tuple[float, float]]) -> float:
    """Time between the first start and the last end in which nothing ran.

    >>> _gaps([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    2.0
    """
    idle, until = 0.0, min((start for start, _ in spans), default=0.0)
    for start, end in sorted(spans):
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle


def profile() -> Answer:
    """What `memo doctor --measure` finds, and how long it takes."""
    from memo_compile.hardware.calibration import measure

    started = time.perf_counter()
    found = measure("cuda")
    return {"took_s": time.perf_counter() - started, "profile": asdict(found)}


PROBES: dict[str, Callable[[], Answer]] = {
    probe.__name__: probe for probe in (link, locking, pieces, pins, dropout, graphs, landings, lengths, step, profile)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask one, and write the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)
    if options.device != "cuda" or not torch.cuda.is_available():
        parser.error("probes ask a CUDA device, and none is here")
    print(json.dumps(PROBES[options.name]()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
