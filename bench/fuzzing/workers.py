"""Judges programs in processes of their own: one that crashes or hangs is a failure of the program that it had."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.fuzzing.oracle import Verdict
from bench.fuzzing.programs import Program

RENEWED = 150  # programs that one process judges: torch's caches grow


@dataclass(frozen=True)
class Task:
    """A program, and how it is to be judged."""

    number: int
    program: Program
    backend: str
    device: str = "cpu"
    ladder: bool = False


def _work(pipe: Connection) -> None:
    import warnings

    import torch

    from bench.fuzzing.oracle import judge

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is there to stay: collections, of which steps make many, need not walk it
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        pipe.send(judge(task.program, task.backend, device=task.device, ladder=task.ladder))


class Worker:
    """One process, made anew when it has ended."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: Any = None
        self._pipe: Any = None
        self._done = 0

    def judge(self, task: Task) -> Verdict:
        """The verdict, "hang" after so many seconds, "crash" where the process ends."""
        if self._process is None or self._done >= RENEWED:
            self._start()
        self._done += 1
        try:
            self._pipe.send(task)
            if self._pipe.poll(self._seconds):
                verdict: Verdict = self._pipe.recv()
                return verdict
            verdict = Verdict("hang", f"no verdict in {self._seconds:.0f} seconds")
        except (EOFError, OSError):
            self._process.join(5)
            verdict = Verdict("crash", f"the process ended with {self._process.exitcode}")
        self.close()
        return verdict

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Costs are the same on every machine, whatever was measured on this one.
        os.environ["MEMO_PROFILES"] = os.devnull
        self._process, self._done = context.Process(target=_work, args=(theirs,), daemon=True), 0
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(1)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None


def judged(tasks: Iterable[Task], jobs: int, seconds: float, until: float) -> Iterator[tuple[Task, Verdict, float]]:
    """Each task with its verdict and seconds, in the order in which they end; none begins after `until`."""
    left = iter(tasks)
    lock = threading.Lock()
    ended: queue.Queue[tuple[Task, Verdict, float] | None] = queue.Queue()

    def run() -> None:
        worker = Worker(seconds)
        try:
            while time.monotonic() < until:
                with lock:
                    task = next(left, None)
                if task is None:
                    return
                started = time.monotonic()
                verdict = worker.judge(task)
                ended.put((task, verdict, time.monotonic() - started))
        finally:
            worker.close()
            ended.put(None)

    for _ in range(jobs):
        threading.Thread(target=run, daemon=True).start()
    running = jobs
    while running:
        entry = ended.get()
        if entry is None:
            running -= 1
        else:
            yield entry
