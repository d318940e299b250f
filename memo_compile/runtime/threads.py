"""The engine for the CPU: one worker thread each way, which really run beside the computation.

Delays can be injected, so that races can be provoked where there is no GPU. The computation itself runs on the thread
that calls, so that what it was given before a copy is done when the copy is asked for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from memo_compile.errors import TransferFailed
from memo_compile.runtime.engine import COPIES, Copy, Direction, Engine, Recorder, host_view

Delay = Callable[[Direction], float]  # seconds to wait before a copy


@dataclass(eq=False, slots=True)
class _Job(Copy):
    src: torch.Tensor | None = None  # references: neither side is freed before the copy has ended
    dst: torch.Tensor | None = None
    delay: Delay | None = None
    after: _Job | None = None
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


# An event is set when what was queued before it has ended.
_Jobs = queue.SimpleQueue[_Job | threading.Event]


class ThreadEngine(Engine):
    """Copies by two threads, started at the first copy."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        super().__init__(recorder)
        self._queues: dict[Direction, _Jobs] = {}
        self._delay: Delay | None = None

    @contextlib.contextmanager
    def delays(self, delay: Delay) -> Iterator[None]:
        """Within, every copy waits `delay(kind)` seconds before it starts."""
        before, self._delay = self._delay, delay
        try:
            yield
        finally:
            self._delay = before

    def computation(self) -> int:
        """See `Engine`: all of it runs where it is called."""
        return 0

    def _queue_after_computation(self, kind: Direction) -> None:
        pass

    def _copy(self, kind: Direction, lease: int, offset: int, device: int, nbytes: int, thread: int) -> Copy:
        return _Job(kind, lease, offset, device, nbytes, thread)

    def _launch(self, copy: Copy, device: torch.Tensor, lease: torch.Tensor, after: Copy | None) -> None:
        assert isinstance(copy, _Job)
        assert after is None or isinstance(after, _Job)
        here, there = device.detach(), host_view(lease, copy.offset, device)
        copy.src, copy.dst = (here, there) if copy.kind is Direction.D2H else (there, here)
        copy.delay, copy.after = self._delay, after
        worker = self._queues.get(copy.kind) or self._worker(copy.kind)
        worker.put(copy)

    def _finish(self, kind: Direction) -> None:
        worker = self._queues.get(kind)
        if worker is not None:
            ended = threading.Event()
            worker.put(ended)
            ended.wait()

    def _order(self, copy: Copy) -> None:
        assert isinstance(copy, _Job)
        copy.done.wait()
        if copy.error is not None:
            raise TransferFailed(
                f"a {copy.kind} copy of {copy.nbytes} bytes at host offset {copy.offset} failed: {copy.error}"
            ) from copy.error

    def _join(self, copy: Copy) -> None:
        assert isinstance(copy, _Job)
        copy.done.wait()

    def _let_go(self, copy: Copy) -> None:
        pass  # a job that has not ended holds its lease: this one has

    def _worker(self, kind: Direction) -> _Jobs:
        jobs: _Jobs = queue.SimpleQueue()
        threading.Thread(target=_work, args=(jobs, self.recorder), name=f"memo-{kind}", daemon=True).start()
        self._queues[kind] = jobs
        return jobs


def _work(jobs: _Jobs, recorder: Recorder) -> None:
    while True:
        job = jobs.get()
        if isinstance(job, threading.Event):
            job.set()
            continue
        try:
            _run(job, recorder)
        except BaseException as error:
            job.error = error
        # Before anyone who waits goes on: a job that has ended holds no tensor, and no other job.
        job.src = job.dst = job.after = None
        job.done.set()
        del job


def _run(job: _Job, recorder: Recorder) -> None:
    if job.after is not None:
        job.after.done.wait()
        # What is written over need not have been read well.
        if job.after.error is not None and job.kind is Direction.H2D:
            raise TransferFailed(f"what it waits for failed: {job.after.error}")
    if job.delay is not None:
        time.sleep(job.delay(job.kind))
    assert job.src is not None
    assert job.dst is not None
    begin = time.perf_counter()
    with torch.no_grad():
        job.dst.copy_(job.src)
    recorder.span(COPIES[job.kind], job, begin, time.perf_counter())
