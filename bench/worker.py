"""Processes that measure one row each, started ahead so that none waits for another's imports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import roster
from bench.common import child_environment
from bench.measurement import Case, measure
from bench.provenance import made
from bench.rows import NothingToStandOn, Row, Rows, within

TICK = 0.05  # seconds between looks for a row
WAIT = 10.0  # seconds that a process which is told to end may take


class Worker:
    """A process that has imported all it needs and waits for one case. It touches no device before it is given one.

    Its compilers' caches are empty, and gone with it.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="memo-row-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        environment = child_environment() | {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        self._row, self._said = folder / "row.json", folder / "said"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.measurement", str(self._row)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                text=True,
                start_new_session=True,
            )

    def start(self, case: Case) -> None:
        """Give it the case."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; `result` says why
            self._process.stdin.write(json.dumps(asdict(case)) + "\n")
            self._process.stdin.flush()

    def result(self, case: Case, seconds: float) -> Row | None:
        """The row; None where it was not there in time. The process has ended, and does not take its time to do so."""
        until = time.monotonic() + seconds
        try:
            while self._process.poll() is None and not self._row.exists() and time.monotonic() < until:
                time.sleep(TICK)
            if self._row.exists():
                row: Row = json.loads(self._row.read_text())
                return row
            return None if self._process.poll() is None else _died(case, self._said.read_text()[-600:])
        finally:
            self.end()

    def end(self) -> None:
        """End the process, and what it started."""
        end(self._process)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._folder.cleanup()


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session of its own, and all in it, also what it left behind."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WAIT)
            return


def _died(case: Case, said: str) -> Row:
    code = roster.code(case.model, case.peer)
    return {**asdict(case), **made(case.device), "code": code, "failed": "died", "said": said}


class Runner:
    """Measures cases one after the other and stores each row at once."""

    def __init__(self, rows: Rows, card: str, in_process: bool = False) -> None:
        """`in_process`: no process of its own for each row, which a test of the program can do without."""
        self.rows, self.card, self._in_process = rows, card, in_process
        self._spare: Worker | None = None

    def measure(self, case: Case, seconds: float) -> Row | None:
        """The row of a case, stored; None where it was not there in time.

        Raises:
            NothingToStandOn: it is to stay within the peak of a peer without figures on this card.
        """
        case = within(case, self.rows, self.card)
        started = time.monotonic()
        row: Row | None = measure(case) if self._in_process else self._apart(case, seconds)
        if row is not None:
            self.rows.add({**row, "card": self.card, "wall_seconds": time.monotonic() - started})
        return row

    def prepare(self) -> None:
        """Have a process ready for the next case."""
        if not self._in_process:
            self._spare = self._spare or Worker()

    def _apart(self, case: Case, seconds: float) -> Row | None:
        self.prepare()
        worker, self._spare = self._spare, None
        assert worker is not None
        worker.start(case)
        self.prepare()
        return worker.result(case, seconds)

    def close(self) -> None:
        """End the process that waits."""
        if self._spare is not None:
            self._spare.end()
            self._spare = None


__all__ = ["NothingToStandOn", "Runner", "Worker", "end"]
