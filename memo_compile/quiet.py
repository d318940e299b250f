"""Keeps what C++ libraries write to the process's own streams from users, who did not ask for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

STDOUT, STDERR = 1, 2


@contextlib.contextmanager
def nowhere(stream: int) -> Iterator[None]:
    """Within, what anybody writes to that file descriptor is lost. For moments only: other threads write there too."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept, null = os.dup(stream), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream)
        yield
        libc.fflush(None)
    finally:
        os.dup2(kept, stream)
        os.close(kept)
        os.close(null)
