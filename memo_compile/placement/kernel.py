"""Compiles native/kernel.cpp at first use, with the compiler that Inductor would take, and calls it.

The library is cached in the user's cache folder under a name that holds a digest of source, compiler and flags.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memo_compile.logs import logger
from memo_compile.placement.core import Core, Ints

log = logger(__name__)

SOURCE = Path(__file__).parent / "native" / "kernel.cpp"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
FOUND, NONE_THERE, NOT_KNOWN = 1, 0, -1


class Kernel:
    """The compiled functions over cores. Calls release the GIL; a nonzero `stop[0]` ends them early."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.memo_first_fit.restype = ctypes.c_int64
        library.memo_improve.restype = ctypes.c_int64
        library.memo_search.restype = ctypes.c_int32
        library.memo_search_joined.restype = ctypes.c_int32

    def first_fit(self, core: Core, order: Ints, stop: npt.NDArray[np.int32]) -> tuple[Ints, int] | None:
        """Offsets and peak, in units, of first fit in an order (indices); None when stopped."""
        offsets = np.zeros(core.n, np.int64)
        peak = self._library.memo_first_fit(*_shape(core), _p(_i32(order)), _p(stop), _p(offsets))
        return None if peak < 0 else (offsets, peak)

    def improve(
        self, core: Core, order: Ints, goal: int, rounds: int, seed: int, stop: npt.NDArray[np.int32]
    ) -> tuple[Ints, int] | None:
        """The best of `rounds` of first fit, in orders that learn from what ended above `goal`; None when stopped."""
        offsets = np.zeros(core.n, np.int64)
        peak = self._library.memo_improve(
            *_shape(core),
            _p(_i32(order)),
            ctypes.c_int64(goal),
            ctypes.c_int32(rounds),
            ctypes.c_uint64(seed),
            _p(stop),
            _p(offsets),
        )
        return None if peak > int(np.sum(core.size) + core.fixed.max(initial=0)) else (offsets, peak)

    def search(
        self, core: Core, rank: Ints, capacity: int, nodes: int, seed: int, stop: npt.NDArray[np.int32]
    ) -> tuple[int, Ints, int]:
        """FOUND, NONE_THERE or NOT_KNOWN; offsets where found; nodes taken."""
        offsets, taken = np.zeros(core.n, np.int64), np.zeros(1, np.int64)
        table_bits = min(20, max(10, int(nodes).bit_length()))
        result = self._library.memo_search(
            *_shape(core),
            ctypes.c_int32(core.moments),
            _p(_i32(rank)),
            ctypes.c_int64(capacity),
            ctypes.c_int64(nodes),
            ctypes.c_int32(table_bits),
            ctypes.c_uint64(seed),
            _p(stop),
            _p(offsets),
            _p(taken),
        )
        return result, offsets, int(taken[0])

    def search_joined(
        self, core: Core, capacity: int, nodes: int, seed: int, stop: npt.NDArray[np.int32]
    ) -> tuple[int, Ints, int]:
        """FOUND or NOT_KNOWN; offsets where found; nodes taken, none where nothing can be joined."""
        offsets, taken = np.zeros(core.n, np.int64), np.zeros(1, np.int64)
        result = self._library.memo_search_joined(
            *_shape(core),
            ctypes.c_int32(core.moments),
            ctypes.c_int64(capacity),
            ctypes.c_int64(nodes),
            ctypes.c_uint64(seed),
            _p(stop),
            _p(offsets),
            _p(taken),
        )
        return result, offsets, int(taken[0])


class _Pointer:
    """Keeps an array alive for as long as a call has its address."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = np.ascontiguousarray(array)
        self._as_parameter_ = ctypes.c_void_p(self.array.ctypes.data)


def _p(array: npt.NDArray[Any]) -> _Pointer:
    return _Pointer(array)


def _i32(array: Ints) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(array, np.int32)


def _shape(core: Core) -> tuple[Any, ...]:
    return ctypes.c_int32(core.n), _p(core.size), _p(_i32(core.start)), _p(_i32(core.end)), _p(core.fixed)


def load(wait: float | None = None) -> Kernel | None:
    """The kernel, compiled if need be; None, with a warning in the log, where there is no C++ compiler that works.

    None as well where compiling takes longer than `wait` seconds: it goes on, and the next call may find it done.
    """
    try:
        return _loading().result(wait)
    except TimeoutError:
        return None


@functools.cache
def _loading() -> Future[Kernel | None]:
    """The kernel once it is there, for the whole process."""
    found: Future[Kernel | None] = Future()

    def work() -> None:
        try:
            found.set_result(_load())
        except BaseException as error:  # whoever waits must hear of it
            found.set_exception(error)

    threading.Thread(target=work, name="placement kernel", daemon=True).start()
    return found


os.register_at_fork(after_in_child=_loading.cache_clear)  # the thread that loads is not there


def _load() -> Kernel | None:
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C++ compiler found (CXX, g++, c++, clang++): placement searches in Python, which is slower")
        return None
    try:
        return Kernel(ctypes.CDLL(str(build(compiler, cache_folder()))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("%s could not compile the placement kernel, placement searches in Python: %s", compiler, detail)
        return None


def find_compiler() -> str | None:
    """The path of CXX, else of g++, c++ or clang++: the order in which Inductor looks."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def cache_folder() -> Path:
    """Where libraries are kept: XDG_CACHE_HOME or ~/.cache, else a folder of this user's in the temporary folder."""
    candidates = [
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memo_compile",
        Path(tempfile.gettempdir()) / f"memo_compile-{os.getuid()}",
    ]
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    return Path(tempfile.mkdtemp(prefix="memo_compile-"))


def build(compiler: str, folder: Path) -> Path:
    """The library in `folder`, compiled unless it is there. Processes may compile at once."""
    texts = [path.read_text() for path in sorted(SOURCE.parent.glob("*.?pp"))]
    key = hashlib.sha256("\0".join([*texts, compiler, *FLAGS, platform.machine()]).encode()).hexdigest()
    library = folder / f"placement-{key[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(library)
    return library
