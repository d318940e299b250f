"""The engine for the CPU: one worker thread each way, which really run beside the computation.

Delays can be injected, so that races can be provoked where there is no GPU.
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
from memo_compile.runtime.engine import Copied, Recorder, host_view

Delay = Callable[[str], float]  # "D2H" or "H2D" -> seconds to wait before the copy


@dataclass
class _Job:
    kind: str
    src: torch.Tensor  # references: neither side is freed before the copy has ended
    dst: torch.Tensor
    offset: int
    delay: Delay | None
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        return self.src.numel() * self.src.element_size()


class ThreadEngine:
    """Copies by two threads, started at the first copy. Safe to use from several threads."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or Recorder()
        self._lock = threading.Lock()
        self._queues: dict[str, queue.SimpleQueue[_Job]] = {}
        self._pending: dict[tuple[str, int, int], _Job] = {}
        self._delay: Delay | None = None

    @contextlib.contextmanager
    def delays(self, delay: Delay) -> Iterator[None]:
        """Within, every copy waits `delay(kind)` seconds before it starts."""
        before, self._delay = self._delay, delay
        try:
            yield
        finally:
            self._delay = before

    def offload(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """See `Engine`."""
        self._start(("D2H", lease.data_ptr(), offset), src, host_view(lease, offset, src), offset)

    def offload_wait(self, src: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """See `Engine`."""
        self._finish(("D2H", lease.data_ptr(), offset))

    def prefetch(self, dst: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
        """See `Engine`."""
        self._start(("H2D", dst.data_ptr(), 0), host_view(lease, offset, dst), dst, offset)

    def prefetch_wait(self, dst: torch.Tensor) -> None:
        """See `Engine`."""
        self._finish(("H2D", dst.data_ptr(), 0))

    def drain(self) -> None:
        """See `Engine`."""
        with self._lock:
            jobs = list(self._pending.values())
            self._pending.clear()
        for job in jobs:
            job.done.wait()

    @property
    def pending(self) -> int:
        """Copies that were started and not waited for."""
        return len(self._pending)

    def _start(self, key: tuple[str, int, int], src: torch.Tensor, dst: torch.Tensor, offset: int) -> None:
        job = _Job(key[0], src.detach(), dst.detach(), offset, self._delay)
        with self._lock:
            stale = self._pending.get(key)
            self._pending[key] = job
            worker = self._queues.get(key[0]) or self._worker(key[0])
        if stale is not None:  # left behind by a step that failed: it must not overtake this one
            stale.done.wait()
        self.recorder.started(job.kind, src.numel() * src.element_size())
        worker.put(job)

    def _finish(self, key: tuple[str, int, int]) -> None:
        with self._lock:
            job = self._pending.pop(key, None)
        if job is None:
            raise TransferFailed(f"a wait for a {key[0]} copy that was never started")
        begin = time.perf_counter()
        job.done.wait()
        self.recorder.waited(time.perf_counter() - begin)
        if job.error is not None:
            raise TransferFailed(f"a {job.kind} copy at host offset {job.offset} failed: {job.error}") from job.error

    def _worker(self, kind: str) -> queue.SimpleQueue[_Job]:
        jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(jobs, self.recorder), name=f"memo-{kind}", daemon=True).start()
        self._queues[kind] = jobs
        return jobs


def _work(jobs: queue.SimpleQueue[_Job], recorder: Recorder) -> None:
    while True:
        job = jobs.get()
        try:
            if job.delay is not None:
                time.sleep(job.delay(job.kind))
            begin = time.perf_counter()
            with torch.no_grad():
                job.dst.copy_(job.src)
            recorder.finished(Copied(job.kind, job.offset, job.nbytes, begin, time.perf_counter()))
        except BaseException as error:
            job.error = error
        # Before anyone who waits goes on: an idle worker holds no tensor.
        job.src = job.dst = torch.empty(0)
        job.done.set()
        del job
