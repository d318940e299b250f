"""Say what memo finds on this machine, and what would stop a plan; with --measure, measure the machine for costs."""

from __future__ import annotations

import argparse
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from memo_compile.errors import InvalidOption, MemoError, UnsupportedTorch
from memo_compile.hardware.host_memory import free_host_memory, memory_limit
from memo_compile.hardware.profiles import resolve, save, stored_profile
from memo_compile.placement.kernel import find_compiler

if TYPE_CHECKING:
    from memo_compile.hardware.efficiency import Efficiency
    from memo_compile.hardware.profiles import DeviceProfile

HELP = "what memo finds on this machine, and what would stop it"
LIBRARIES = ("torch", "triton", "networkx", "highspy", "numpy", "rich")
LITTLE = 2 * 2**30  # bytes of host memory below which offloading has no room to speak of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--measure", action="store_true", help='measure copies and kernels; hardware="auto" uses it')
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="what to measure or look at (a GPU where there is one)"
    )


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `stops`: nothing can be compiled so; `advice`: what to do, "" where all is well."""

    what: str
    found: str
    advice: str = ""
    stops: bool = False


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 where something stops memo."""
    import torch  # takes a second, and not every caller needs it
    from rich.console import Console

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InvalidOption("--device", "cuda", "cpu: torch sees no CUDA device here")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    if arguments.measure:
        _measure(device, Console(stderr=True))
    findings = list(examine(device))
    console.print(_table(findings))

    console.print(_profile(resolve("auto", device)))
    return int(any(f.stops for f in findings))


def _measure(device: str, console: Any) -> None:
    from memo_compile.hardware.calibration import measure  # loads torch

    with console.status("measuring") as status:
        profile = measure(device, lambda text: status.update(f"measuring {text}"))
    path = stored_profile(device)
    try:
        save(profile, path)
    except OSError as error:
        raise MemoError(
            f"the profile cannot be written to {path} ({error}). MEMO_PROFILES names another folder"
        ) from error
    console.print(f'The profile is in {path}; hardware="auto" uses it for {device} on this machine.')


def examine(device: str) -> Iterator[Finding]:
    """Versions, devices and limits, as far as they matter to memo."""
    yield Finding("Python", platform.python_version())
    for name in LIBRARIES:
        yield from _library(name, device)
    yield _torch_supported()
    yield _compiler()
    yield from _devices(device)
    yield _host_memory()
    yield _locked_memory(device)


def _library(name: str, device: str) -> Iterator[Finding]:
    try:
        yield Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        if name != "triton" or device == "cuda":
            yield Finding(name, "missing", f"install it: pip install {name}", stops=True)


def _torch_supported() -> Finding:
    from memo_compile.versions import check_torch  # loads torch

    try:
        check_torch()
    except UnsupportedTorch as error:
        return Finding("torch is supported", "no", str(error), stops=True)
    return Finding("torch is supported", "yes")


def _compiler() -> Finding:
    found = find_compiler()
    if found is None:
        advice = "install g++, or name a compiler in CXX; backend memo_eager and memo plan work without"
        return Finding("C++ compiler", "none", advice, stops=True)
    return Finding("C++ compiler", found)


def _devices(device: str) -> Iterator[Finding]:
    import torch  # takes a second, and not every caller needs it

    if device == "cpu":
        advice = "" if torch.version.cuda is None else "this torch is built for CUDA, but no GPU is visible"
        yield Finding("GPU", "none seen by torch", advice)
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        busy = "another process holds a tenth or more of it" if free < 0.9 * total else ""
        yield Finding(
            f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free", busy
        )


def _host_memory() -> Finding:
    free, limit = free_host_memory(), memory_limit()
    found = f"{free / 2**30:.1f} GiB free" + (f", limit of the cgroup {limit / 2**30:.1f} GiB" if limit else "")
    if free >= LITTLE:
        return Finding("host memory", found)
    return Finding("host memory", found, "there is little room to offload to: free some, or raise the cgroup's limit")


def _locked_memory(device: str) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    if device == "cpu" or soft == resource.RLIM_INFINITY:
        return Finding("lockable memory", found)
    return Finding(
        "lockable memory", found, "raise it (ulimit -l unlimited): pageable copies are slower and do not overlap"
    )


def _table(findings: list[Finding]) -> Any:
    from rich import box  # loads rich
    from rich.table import Table

    table = Table(title="This machine", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for f in findings:
        style = "bold red" if f.stops else "yellow" if f.advice else ""
        table.add_row(f.what, f.found, f.advice, style=style)
    return table


def _profile(p: DeviceProfile) -> Any:
    from rich import box  # loads rich
    from rich.table import Table

    table = Table(title=f"Profile for costs: {p.name}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", overflow="fold")
    for dtype, rate in p.peak_flops.items():
        table.add_row(f"peak in {dtype}", f"{rate / 1e12:,.3g} TFLOP/s")
    table.add_row(
        "memory", f"{p.memory / 2**30:,.1f} GiB at {p.memory_bandwidth * p.memory_efficiency / 1e9:,.0f} GB/s"
    )
    table.add_row(
        "to the host, and back", f"{p.d2h / 1e9:.3g} and {p.h2d / 1e9:.3g} GB/s; at once {p.both_ways:.0%} of each"
    )
    for name, shares, by, classes in (
        ("matmuls", p.matmul_efficiency, "rows", p.matmuls_by_rows),
        ("attention", p.attention_efficiency, "heads", p.attention_by_heads),
        ("its backward", p.attention_backward_efficiency, "heads", p.attention_backward_by_heads),
    ):
        table.add_row(f"{name}, of the peak", _shares(shares))
        for key, of_class in classes:
            table.add_row(f"  {key:.0f} {by}", _shares(of_class))
    table.add_row("source", p.source)
    for note in p.notes:
        table.add_row("note", note)
    return table


def _shares(shares: Efficiency) -> str:
    return ", ".join(f"{share:.0%} at {size:.0e}" for size, share in shares) + " FLOPs"
