"""What a compilation is doing, for who waits for it: on a terminal beside a spinner, elsewhere in the log.

Nothing is shown of what is done within two seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from memo_compile.logs import first_rank, logger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

log = logger(__name__)

PATIENCE = 2.0  # seconds


class Progress:
    """The steps of one compilation, within `with`: what takes it over `patience` seconds is shown."""

    def __init__(self, name: str = "", patience: float = PATIENCE, console: Console | None = None) -> None:
        self.name, self.patience, self._console = name, patience, console
        self._lock = threading.Lock()
        self._text, self._shows, self._started = "", False, 0.0
        self._status: Status | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Progress:
        self._started = time.perf_counter()
        self._timer = threading.Timer(self.patience, self._begin)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._timer is not None
        self._timer.cancel()
        with self._lock:
            self._timer, self._shows = None, False
            if self._status is not None:
                self._status.stop()
                self._status = None

    def step(self, text: str) -> None:
        """Say what is done from now on."""
        with self._lock:
            changed, self._text = text != self._text, text
            if self._shows and changed:
                self._show()

    def _begin(self) -> None:
        with self._lock:
            self._shows = self._timer is not None  # else the compilation has just ended
            if self._shows:
                self._show()

    def _show(self) -> None:
        if not self._text:
            return
        console = self._console or _terminal()
        if console is None:
            log.info("%s: %s (%.0f s)", self.name, self._text, time.perf_counter() - self._started)
            return
        self._console = console
        if self._status is None:
            self._status = console.status("")
            self._status.start()
        self._status.update(f"memo, {self.name}: {self._text}")


def _terminal() -> Console | None:
    """Where errors are shown, if that is a terminal; of ranks, the first has it."""
    if not sys.stderr.isatty() or not first_rank():
        return None
    from rich.console import Console  # loads rich

    return Console(stderr=True)
