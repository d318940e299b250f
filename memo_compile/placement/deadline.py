"""When to stop: a moment, and a flag that compiled code can read."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import numpy as np


class Deadline:
    """Passes `seconds` from now. Within its context a timer sets `stop[0]` when it does.

    >>> Deadline(0).passed(), Deadline(60).passed()
    (True, False)
    """

    def __init__(self, seconds: float) -> None:
        seconds = min(seconds, threading.TIMEOUT_MAX / 2)
        self._end = time.perf_counter() + seconds
        self.stop = np.zeros(1, np.int32)
        self._timer = threading.Timer(max(0.0, seconds), self._set)
        self._timer.daemon = True

    def remaining(self) -> float:
        """Seconds until it passes, at least 0."""
        return max(0.0, self._end - time.perf_counter())

    def passed(self) -> bool:
        """Whether it has passed."""
        return self.remaining() == 0

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._timer.cancel()
        self._timer.join()

    def _set(self) -> None:
        self.stop[0] = 1
