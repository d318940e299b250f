"""Probes of the link and of host memory: rates, page-locking, copies in pieces, what torch page-locks itself."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.probes.timing import GIB, Answer, Scene, issued, locked, on_cuda, pinned_by_torch, timed
from memo_compile.runtime.cudart import copy_planes
from memo_compile.runtime.engine import Direction
from memo_compile.runtime.numa import node_of_device, nodes
from memo_compile.runtime.pieces import planes

HUGE_PAGES, KEEP_FROM_CHILDREN, EMPTY_IN_CHILDREN = 14, 10, 18  # madvise's MADV_HUGEPAGE, _DONTFORK and _WIPEONFORK


def link(scene: Scene) -> Answer:
    """The link's GB/s each way, alone and both at once, and a series of matmuls alone and beside both copies.

    And the NUMA nodes: `locked` memory lies where its pages are first written, memo's on the GPU's node.
    """
    on_cuda(scene)
    size = 2 * GIB
    (out, _), (back, _) = locked(size), locked(size)
    here, there = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            out.copy_(here, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            there.copy_(back, non_blocking=True)

    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    y = x @ x

    def matmuls() -> None:
        for _ in range(50):
            torch.mm(x, x, out=y)

    def beside() -> None:
        both()
        matmuls()

    for warm in (both, matmuls):
        timed(warm)
    return {
        "to_host_GBs": size / timed(lambda: out.copy_(here, non_blocking=True)) / 1e9,
        "from_host_GBs": size / timed(lambda: there.copy_(back, non_blocking=True)) / 1e9,
        "each_at_once_GBs": size / timed(both) / 1e9,
        "matmuls_s": timed(matmuls),
        "products_beside_copies_s": timed(beside),
        "numa_nodes": len(nodes()),
        "node_of_gpu": node_of_device(torch.device("cuda")),
    }


def locking(scene: Scene) -> Answer:
    """Seconds to page-lock 2 GiB of five kinds of memory, the last one memo's, and GB/s of a copy into each."""
    on_cuda(scene)
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
        host, seconds = locked(2 * GIB, flags, advice)
        host.copy_(source)
        rate = 2 * GIB / timed(lambda host=host: host.copy_(source, non_blocking=True)) / 1e9  # type: ignore[misc]
        answer[name] = {"lock_s": seconds, "copy_GBs": rate}
    return answer


def pieces(scene: Scene) -> Answer:
    """32 pieces of 8 MiB to the host: one by one, as one two-dimensional copy, and dense by torch and by address."""
    on_cuda(scene)
    heads, tokens, size = 32, scene.size(65536), 128
    source = torch.zeros(heads, tokens, size, dtype=torch.bfloat16, device="cuda")
    half = source[:, : tokens // 2]
    host, _ = locked(half.numel() * half.element_size())
    there = host.view(torch.bfloat16).view(half.shape)
    dense = source[: heads // 2].view(half.shape)

    def one_by_one() -> None:
        for head in range(heads):
            there[head].copy_(half[head], non_blocking=True)

    def by_address(value: Tensor) -> None:
        if not copy_planes(planes(there, value), Direction.D2H, torch.cuda.current_stream().cuda_stream):
            raise OSError("the runtime refuses")

    ways: dict[str, Callable[[], Any]] = {
        "one_by_one": one_by_one,
        "at_once": lambda: by_address(half),
        "dense_by_torch": lambda: there.copy_(dense, non_blocking=True),
        "dense_by_address": lambda: by_address(dense),
    }
    answer = {}
    for name, copy in ways.items():
        timed(copy)
        answer[name] = {"device_s": timed(copy), "processor_s": issued(copy)}
    return answer


def pins(scene: Scene) -> Answer:
    """Bytes that torch itself has page-locked after each kind of copy between memo's memory and the device."""
    on_cuda(scene)
    source = torch.zeros(8, 1024, 1024, 64, dtype=torch.uint8, device="cuda")
    host, _ = locked(source.numel())
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
        answer[name] = pinned_by_torch()
    return answer
