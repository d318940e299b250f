"""What a forked child, such as a data loader's worker, costs a block of host memory, by the kind of its mapping.

    python -m bench.children [--mib 1024]

Each block is written once, then again while a child lives that was forked in between: seconds of both, of the fork, and
the memory that the system has less of after the second.
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.common import save
from memo_compile.hardware.host_memory import free_host_memory
from memo_compile.logs import MIB
from memo_compile.runtime.blocks import map_block

HUGE_PAGES, NOT_IN_CHILDREN = 14, 10  # madvise's MADV_HUGEPAGE and MADV_DONTFORK
Make = Callable[[int], mmap.mmap]


def mapping(flags: int, *advice: int) -> Make:
    """A function that maps so many bytes."""

    def make(nbytes: int) -> mmap.mmap:
        made = mmap.mmap(-1, nbytes, flags=flags | mmap.MAP_ANONYMOUS)
        for kind in advice:
            made.madvise(kind)
        return made

    return make


KINDS: dict[str, Make] = {
    "shared": mapping(mmap.MAP_SHARED),
    "private": mapping(mmap.MAP_PRIVATE),
    "private, huge pages": mapping(mmap.MAP_PRIVATE, HUGE_PAGES),
    "private, huge pages, not in children": mapping(mmap.MAP_PRIVATE, HUGE_PAGES, NOT_IN_CHILDREN),
    "memo's: private, huge pages, empty in children": lambda nbytes: map_block(nbytes, torch.device("cpu")).memory,
}


def write(block: mmap.mmap) -> float:
    """Seconds to write all of it."""
    filled = b"x" * MIB
    started = time.perf_counter()
    for at in range(0, len(block), MIB):
        block[at : at + MIB] = filled
    return time.perf_counter() - started


def beside_a_child(make: Make, nbytes: int) -> dict[str, Any]:
    """One row."""
    block = make(nbytes)
    first = write(block)
    over, end = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.read(over, 1)
        os._exit(0)
    forked, before = time.perf_counter() - started, free_host_memory()
    again, taken = write(block), before - free_host_memory()
    os.write(end, b".")
    os.waitpid(child, 0)
    return {"first_s": first, "fork_s": forked, "again_s": again, "taken_bytes": taken}


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    size = parser.parse_args().mib
    rows = [{"kind": kind, **beside_a_child(make, size * MIB)} for kind, make in KINDS.items()]
    lines = [
        "| mapping | written first, s | fork, ms | written beside a child, s | MiB taken by that |",
        "|---" * 5 + "|",
    ]
    lines += [
        f"| {r['kind']} | {r['first_s']:.2f} | {1000 * r['fork_s']:.1f} | {r['again_s']:.2f} "
        f"| {r['taken_bytes'] / MIB:.0f} |"
        for r in rows
    ]
    print("\n".join(lines))
    save("children", f"python -m bench.children --mib {size}", rows, "\n".join(lines))


if __name__ == "__main__":
    main()
