"""What `torch.cuda.cudart()` lacks, from the CUDA runtime library that torch itself has loaded.

torch binds `cudaHostRegister` and `cudaHostUnregister` (torch/csrc/cuda/shared/cudart.cpp), which give back their error
and leave it behind as the thread's last one: the next kernel that torch launches would report it as its own. Neither
`cudaGetLastError` nor copies by address are bound, so that they are called by ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from memo_compile.runtime.engine import Direction
from memo_compile.runtime.pieces import Plane

_KINDS = {Direction.H2D: 1, Direction.D2H: 2}  # cudaMemcpyKind, driver_types.h
_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p
_MAPS = Path("/proc/self/maps")


def page_lock(address: int, nbytes: int) -> int:
    """Register host memory for DMA; the CUDA error with which that was refused, 0 where it was not."""
    runtime: Any = torch.cuda.cudart()
    return _cleared(int(runtime.cudaHostRegister(address, nbytes, 0)))


def page_unlock(address: int) -> int:
    """The opposite of `page_lock`."""
    runtime: Any = torch.cuda.cudart()
    return _cleared(int(runtime.cudaHostUnregister(address)))


def copy_planes(planes: Iterable[Plane], kind: Direction, stream: int) -> bool:
    """Queue copies by address on a stream, those of several rows in two dimensions; whether all were taken."""
    runtime = library()
    if runtime is None:
        return False
    for p in planes:
        if p.height == 1:  # of any length, where pitches have a limit
            error = runtime.cudaMemcpyAsync(p.dst, p.src, p.width, _KINDS[kind], stream)
        else:
            sides = p.dst, p.dst_pitch, p.src, p.src_pitch
            error = runtime.cudaMemcpy2DAsync(*sides, p.width, p.height, _KINDS[kind], stream)
        if _cleared(error):
            return False
    return True


def _cleared(error: int) -> int:
    if error:
        clear_error()
    return error


def clear_error() -> None:
    """Forget the last error of this thread, which its caller has heard of."""
    runtime = library()
    if runtime is not None:
        runtime.cudaGetLastError()
        return
    with contextlib.suppress(RuntimeError):  # a kernel's launch finds it, takes it, and complains
        torch.ones(1, device="cuda")


@cache
def library() -> Any:
    """The runtime library that torch has loaded, None where it is linked into torch."""
    path = loaded_path(_MAPS, str(torch.version.cuda).split(".")[0])
    if path is None:
        return None
    runtime = ctypes.CDLL(path)
    runtime.cudaGetLastError.argtypes = []
    runtime.cudaMemcpyAsync.argtypes = [_POINTER, _POINTER, _SIZE, ctypes.c_int, _POINTER]
    runtime.cudaMemcpy2DAsync.argtypes = [_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, ctypes.c_int, _POINTER]
    return runtime


def loaded_path(maps: Path, major: str) -> str | None:
    """Where this process has loaded the runtime of a major version from, by its memory map."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines)
    return next((p for p in paths if f"/libcudart.so.{major}" in p), None)
