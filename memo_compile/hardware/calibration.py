"""Measures this machine: copies each way and both at once, memory bandwidth, matmuls and attention by their shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from memo_compile.hardware.efficiency import Classes, Efficiency
from memo_compile.hardware.host_memory import free_host_memory
from memo_compile.hardware.profiles import DeviceProfile, built_in, machine_name

Say = Callable[[str], None]

COPY = {"cpu": 256 * 2**20, "cuda": 2**30}  # bytes of one copy
WIDTHS = {"cpu": (64, 128, 256, 512, 1024, 2048), "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384)}
TOKENS = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
ROWS = {"cpu": (16, 128), "cuda": (128, 512, 2048)}  # of matmuls that are wider
WIDE = {"cpu": (256, 1024), "cuda": (2048, 4096, 16384)}
GROUPS = {"cpu": (1,), "cuda": (1, 32)}  # heads of attention, beside HEADS
TYPES = {"cpu": ("float32", "float64", "bfloat16"), "cuda": ("bfloat16", "float16", "float32", "float64")}
REPEATS = 5
A_WHILE, MOST_CALLS = 0.2, 5000  # seconds
HEADS, HEAD = 8, 128
TINY = 1e-9


def measure(device: str, say: Say = lambda _: None) -> DeviceProfile:
    """A profile of this machine's device of that type ("cpu" or "cuda"), in less than a minute.

    The peak of each type of number is the best rate that a matmul reached, so that efficiencies are shares of that.
    Links between devices are not measured: they are those of the built-in profile.
    """
    base = built_in(device)
    say("copies to the host, back, and both at once")
    d2h, h2d, both = _copies(device)
    say("memory bandwidth")
    bandwidth = _bandwidth(device)
    peaks: dict[str, float] = {}
    for name in TYPES[device]:
        say(f"matmuls in {name}")
        width = WIDTHS[device][-2]
        peaks[name] = _matmul(device, width, width, getattr(torch, name)).rate
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    kind = str(dtype).removeprefix("torch.")
    square, thin = _matmuls(device, dtype, say)
    peak = peaks[kind] = max(peaks[kind], *(r.rate for rates in (square, *thin.values()) for r in rates))
    forward, backward = _attentions(device, dtype, say)
    matmul = _shares(square, peak)
    return replace(
        base,
        name=machine_name(device),
        device=device,
        peak_flops=peaks,
        memory_bandwidth=bandwidth,
        memory_efficiency=1.0,
        d2h=d2h,
        h2d=h2d,
        both_ways=both,
        memory=torch.cuda.get_device_properties(device).total_memory if device == "cuda" else free_host_memory(),
        host_memory=free_host_memory(),
        launch_overhead=_launch(device),
        matmul_efficiency=matmul,
        attention_efficiency=_shares(forward[HEADS], peak),
        attention_backward_efficiency=_shares(backward[HEADS], peak),
        matmuls_by_rows=(*_classes(thin, peak), (float(WIDTHS[device][-1]), matmul)),
        attention_by_heads=_classes(forward, peak),
        attention_backward_by_heads=_classes(backward, peak),
        source=f"measured by memo doctor with torch {torch.__version__}, {torch.get_num_threads()} threads",
        notes=(),
    )


@dataclass(frozen=True)
class Rate:
    """FLOPs of an op, and FLOP/s that it reached."""

    flops: float
    rate: float


Rates = list[Rate]


def _matmuls(device: str, dtype: torch.dtype, say: Say) -> tuple[Rates, dict[int, Rates]]:
    """Square matmuls by width; and for each number of rows, the square one and wider ones."""
    square = []
    for width in WIDTHS[device]:
        say(f"matmuls of {width} × {width}")
        square.append(_matmul(device, width, width, dtype))
    thin: dict[int, Rates] = {}
    for rows in ROWS[device]:
        say(f"matmuls of {rows} rows")
        widths = (rows, *(w for w in WIDE[device] if w > rows))
        thin[rows] = [_matmul(device, rows, width, dtype) for width in widths]
    return square, thin


def _attentions(device: str, dtype: torch.dtype, say: Say) -> tuple[dict[int, Rates], dict[int, Rates]]:
    """Causal attention by heads and length, forward and backward."""
    forward: dict[int, Rates] = {}
    backward: dict[int, Rates] = {}
    for heads in sorted({*GROUPS[device], HEADS}):
        lengths = TOKENS[device] if heads == HEADS else TOKENS[device][1::2]
        say(f"attention over {heads} heads")
        forward[heads], backward[heads] = [], []
        for tokens in lengths:
            one = 2.0 * heads * tokens * tokens * HEAD / 2
            front, back = _attention(device, heads, tokens, dtype)
            forward[heads].append(Rate(2 * one, 2 * one / front))
            backward[heads].append(Rate(5 * one, 5 * one / back))
    return forward, backward


def _classes(rates: dict[int, Rates], peak: float) -> Classes:
    return tuple((float(key), _shares(found, peak)) for key, found in sorted(rates.items()))


def _shares(rates: Rates, peak: float) -> Efficiency:
    """Shares of the peak by size, made to rise: a larger op that was disturbed tells nothing about its size."""
    best, table = 0.0, []
    for found in sorted(rates, key=lambda found: found.flops):
        best = max(best, min(1.0, found.rate / peak))
        table.append((found.flops, max(best, TINY)))
    return tuple(table)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(device: str, fn: Callable[[], Any], repeats: int = REPEATS) -> float:
    """On a CPU the fastest of a few runs, after one to warm up; on a GPU the mean over a while, after a while.

    A GPU runs what is queued one after the other, and lowers its clocks after some tenths of a second of hard work:
    waiting for every run would count the wait as work, and short runs would show rates that no training reaches.
    """
    fn()
    if device == "cpu":
        return min(_timed(device, fn, 1) for _ in range(repeats))
    calls = max(1, min(MOST_CALLS, int(A_WHILE / _timed(device, fn, 1))))
    _timed(device, fn, calls)
    return _timed(device, fn, calls) / calls


def _timed(device: str, fn: Callable[[], Any], calls: int) -> float:
    """Seconds that so many runs take, one after the other."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        fn()
    _wait(device)
    return time.perf_counter() - started


def _copies(device: str) -> tuple[float, float, float]:
    """Bytes/s to the host and back, and the share of both that is left when they run at once.

    On a CPU "the device" is memory too: copies are memcpy, by one thread each way, as memo's engine does them.
    """
    size = COPY[device]
    pinned = device == "cuda"
    there = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
    here = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    out = _seconds(device, lambda: here[0].copy_(there[0], non_blocking=True))
    back = _seconds(device, lambda: there[1].copy_(here[1], non_blocking=True))
    together = _seconds(device, _both(device, here, there))
    return size / out, size / back, min(1.0, max(out, back) / together)


def _both(device: str, here: list[torch.Tensor], there: list[torch.Tensor]) -> Callable[[], None]:
    if device == "cuda":
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]

        def on_streams() -> None:
            with torch.cuda.stream(streams[0]):
                here[0].copy_(there[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                there[1].copy_(here[1], non_blocking=True)

        return on_streams
    workers = ThreadPoolExecutor(2)

    def on_threads() -> None:
        wait([workers.submit(here[0].copy_, there[0]), workers.submit(there[1].copy_, here[1])])

    return on_threads


def _bandwidth(device: str) -> float:
    """Bytes read and written a second by an elementwise op over more than any cache holds."""
    x = torch.zeros(COPY[device] // 4, device=device)
    y = torch.empty_like(x)
    return 2 * COPY[device] / _seconds(device, lambda: torch.add(x, 1.0, out=y))


def _matmul(device: str, rows: int, width: int, dtype: torch.dtype) -> Rate:
    """Of (rows, width) times (width, width)."""
    a, b = (torch.rand(n, width, device=device).to(dtype) for n in (rows, width))
    flops = 2.0 * rows * width**2
    return Rate(flops, flops / _seconds(device, lambda: a @ b, 3 if width > 1024 else REPEATS))


def _attention(device: str, heads: int, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of causal attention, forward and backward."""
    q, k, v = (torch.rand(1, heads, tokens, HEAD, device=device).to(dtype).requires_grad_() for _ in range(3))

    def run() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    gradient = torch.ones_like(run())
    forward = _seconds(device, run, 3)
    out = run()
    back = _seconds(device, lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), 3)
    return forward, back


def _launch(device: str) -> float:
    """Seconds that an op of no size takes, issued one after another."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(100):
            x.add_(1)

    return _seconds(device, many) / 100
