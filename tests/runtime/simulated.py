"""CUDA's streams and events on threads: what was queued runs later, in order, with injected delays.

It stands for `torch.cuda` in `StreamEngine`, so that its rules are tested where there is no GPU. As on a GPU the host
runs ahead: `Computation.do` queues work on the compute stream and returns.
"""

import contextlib
import ctypes
import queue
import sys
import threading
import time

import torch


class Event:
    """Recorded on a stream: set when all that was queued there before is done. Before it is recorded it is set."""

    def __init__(self):
        self.done = threading.Event()
        self.done.set()

    def record(self, stream):
        self.done = threading.Event()
        stream.queue.put(self.done.set)

    def synchronize(self):
        assert self.done.wait(10), "a deadlock"


class Stream:
    """Work in order, on a thread of its own; `delay()` seconds before each piece."""

    def __init__(self, delay):
        self.queue, self.delay = queue.SimpleQueue(), delay
        self.cuda_stream = id(self)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while (work := self.queue.get()) is not None:
            work()

    def wait_event(self, event):
        done = event.done  # what it stands for now
        self.queue.put(lambda: done.wait(10))

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)

    def do(self, work):
        def later():
            time.sleep(self.delay())
            work()

        self.queue.put(later)

    def synchronize(self):
        event = Event()
        event.record(self)
        event.synchronize()


def copy_rows(plane):
    """As cudaMemcpy2DAsync does, by address."""
    for row in range(plane.height):
        ctypes.memmove(plane.dst + row * plane.dst_pitch, plane.src + row * plane.src_pitch, plane.width)


class Cuda:
    """What `StreamEngine` asks of `torch.cuda`."""

    Event = Event

    def __init__(self, delay=lambda: 0.0, two_dimensions=False):
        self.delay, self.two_dimensions = delay, two_dimensions
        self.streams = []
        self.compute = self.Stream(None)

    def Stream(self, device):  # noqa: N802
        self.streams.append(Stream(self.delay))
        return self.streams[-1]

    def current_stream(self, device):
        return self.compute

    def capturing(self):
        return False

    def on(self, stream):
        return contextlib.nullcontext()

    def copy_planes(self, planes, kind, stream):
        if self.two_dimensions:
            for plane in planes:
                stream.do(lambda plane=plane: copy_rows(plane))
        return self.two_dimensions

    def kept(self, device):
        return 0, 0

    def free(self, device):
        return sys.maxsize

    def copy(self, dst, src, stream):
        def work():
            with torch.no_grad():
                dst.copy_(src)

        stream.do(work)

    def close(self):
        for stream in self.streams:
            stream.queue.put(None)
