"""Plays a plan step by step on three streams with finite memory: compute, device to host, host to device.

It shares the problem's figures with the linear program, and nothing else: it is what the program's prediction is held
against. Each copy engine works through its queue slice by slice, in order. A slice can leave once its step has ended,
and its bytes are free once it has been copied; a step that does not fit waits for that. Slices come back as late as the
link allows, by a schedule made backwards from their first uses within the room that the budget leaves; a step whose
slices are not there waits for them. What is recomputed runs on the compute stream before the step that needs it first.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning.residency import Activation, Problem

RECOMPUTE = "recompute"  # the name of an event: what a step recomputes before it runs


class Stream(StrEnum):
    """What runs beside the others."""

    COMPUTE = "compute"
    D2H = "d2h"
    H2D = "h2d"


class Stall(StrEnum):
    """What compute waits for: bytes that have not left yet, or bytes that are not back yet."""

    ROOM = "room"
    PREFETCH = "prefetch"


EMPTY = 1e-6  # bytes: below that a job is done


@dataclass(frozen=True)
class Event:
    """Something on one stream. Seconds from the start of the step."""

    stream: Stream
    name: str
    start: float
    end: float
    bytes: int = 0


@dataclass(frozen=True)
class Simulation:
    """What happened. Seconds and bytes; `overlap` is the share of the copies' seconds during which compute ran.

    `stalls` are the seconds that compute waited.
    `peak` is the most that was held. `fits` tells whether that is within the budget.
    """

    seconds: float
    compute_seconds: float
    recompute_seconds: float
    stalls: Mapping[Stall, float]
    peak: int
    fits: bool
    offloaded_bytes: int
    prefetched_bytes: int
    overlap: float
    memory: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    events: tuple[Event, ...] = field(default=(), repr=False)

    def to_trace(self) -> str:
        """The step as Chrome's trace format, which Perfetto opens: three streams, and memory as a counter."""
        rows: list[dict[str, Any]] = [
            {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": name}}
            for tid, name in enumerate(Stream)
        ]
        for e in self.events:
            row = {"ph": "X", "pid": 0, "tid": [*Stream].index(e.stream), "name": e.name, "ts": e.start * 1e6}
            rows.append({**row, "dur": (e.end - e.start) * 1e6, "args": {"bytes": e.bytes} if e.bytes else {}})
        rows += [
            {"ph": "C", "pid": 0, "name": "device memory", "ts": at * 1e6, "args": {"bytes": held}}
            for at, held in self.memory
        ]
        return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})


def simulate(problem: Problem, residency: Mapping[str, Residency]) -> Simulation:
    """Play one training step of `problem` with the given residency.

    Where a step needs more than the budget even when all copies are done, it runs all the same, and `fits` is False.
    """
    return _Player(problem, residency).play()


@dataclass
class _Job:
    """One activation's slices on their way. `remaining` bytes are still to be copied."""

    name: str
    size: float
    remaining: float
    released: float  # seconds from which they can move
    due: int  # the step from which on their bytes should be gone, or by which they must be there
    began: float = -1.0


class _Player:
    def __init__(self, problem: Problem, residency: Mapping[str, Residency]) -> None:
        self.p, self.residency = problem, residency
        self.steps = len(problem.seconds)
        self.budget = np.inf if problem.budget is None else float(problem.budget)
        self.now = self.computed = 0.0
        self.stalls = dict.fromkeys(Stall, 0.0)
        self.events: list[Event] = []
        self.memory: list[tuple[float, int]] = []
        self.needs = self._resident_bytes()
        self.extra = self._recomputation()
        self.produced: dict[int, list[Activation]] = {}
        for a in problem.activations:
            self.produced.setdefault(a.produced, []).append(a)
        out = sorted((a for a in problem.activations if residency[a.name].offloaded), key=_due)
        back = sorted(out, key=lambda a: (_needed(a), a.produced))
        self.out = deque(
            _Job(a.name, _offloaded_bytes(a, residency), _offloaded_bytes(a, residency), np.inf, a.last_forward + 1)
            for a in out
        )
        self.out_by_name = {job.name: job for job in self.out}
        self.back = deque(
            _Job(a.name, _offloaded_bytes(a, residency), _offloaded_bytes(a, residency), np.inf, _needed(a))
            for a in back
        )
        self.overdue: deque[_Job] = deque()
        self.pending = sorted(self.out_by_name.values(), key=lambda job: job.due)
        self.out_at = self.back_at = 0.0  # how far each engine's clock has come
        self.early = 0.0  # bytes landed before the step that needs them
        self.targets = self._prefetch_schedule()

    def _resident_bytes(self) -> np.ndarray[Any, Any]:
        """Bytes at each step with instantaneous transfers: what no schedule of copies can go below."""
        change = np.zeros(self.steps + 1)
        for a in self.p.activations:
            gone = a.bytes * (1 - self.residency[a.name].kept / a.tokens)
            change[0] += (self.p.calls - 1) * (a.bytes - gone)
            change[a.produced] += a.bytes
            change[min(a.last_forward + 1, self.steps)] -= gone
            change[min(_needed(a), self.steps)] += gone
            change[min(a.last_backward + 1, self.steps)] -= a.bytes
            for begin, end in self.p.away(a) if self.residency[a.name].offloaded == a.tokens else ():
                change[begin] -= a.bytes
                change[end] += a.bytes
        resident: np.ndarray[Any, Any] = np.cumsum(change[:-1]) + np.array(self.p.base_bytes, dtype=float)
        return resident

    def _recomputation(self) -> np.ndarray[Any, Any]:
        """Seconds of recomputation before each step."""
        extra = np.zeros(self.steps)
        for a in self.p.activations:
            home = self.residency[a.name]
            if home.recomputed:
                extra[min(_needed(a), self.steps - 1)] += (a.recompute_seconds or 0.0) * home.recomputed / a.tokens
        return extra

    def _prefetch_schedule(self) -> np.ndarray[Any, Any]:
        """Bytes that should have landed early by the end of each step: backwards, as late as the link allows."""
        need = np.zeros(self.steps + 1)
        for job in self.back:
            need[job.due] += job.size
        early = np.zeros(self.steps + 1)
        wanted = 0.0
        for step in range(self.steps - 1, self.p.forward_steps - 1, -1):
            early[step] = min(wanted, max(0.0, self.budget - self.needs[step]))
            seconds = self.p.seconds[step] + self.extra[step]
            wanted = need[step] + max(0.0, early[step] - self.p.h2d * seconds)
        return early

    def play(self) -> Simulation:
        for step in range(self.steps):
            self._overdue_until(step)
            self._wait_for_room(step)
            self._wait_for_prefetches(step)
            held = self.needs[step] + self._held()
            wanted_early = max(self.early, min(float(self.targets[step]), self.budget - held))
            self.memory.append((self.now, int(held + wanted_early)))
            self._run(step, wanted_early)
        self._drain()
        return self._result()

    def _overdue_until(self, step: int) -> None:
        while self.pending and self.pending[0].due <= step:
            self.overdue.append(self.pending.pop(0))

    def _held(self) -> float:
        """Bytes whose last use is past and whose copy is not."""
        while self.overdue and self.overdue[0].remaining <= EMPTY:
            self.overdue.popleft()
        return sum(job.remaining for job in self.overdue)

    def _wait_for_room(self, step: int) -> None:
        """Let the D2H engine run until the step fits."""
        over = self.needs[step] + self._held() + self.early - self.budget
        if over <= EMPTY * max(1.0, self.budget if np.isfinite(self.budget) else 1.0):
            return
        began = self.now
        self._copy_out(np.inf, enough=min(over, self._held()))
        self.now = max(self.now, self.out_at)
        self.stalls[Stall.ROOM] += self.now - began
        self._copy_back(self.now, wanted_early=float(self.targets[step - 1]) if step else 0.0)

    def _wait_for_prefetches(self, step: int) -> None:
        """Let the H2D engine run until all that the step needs is there."""
        missing = (
            sum(job.remaining for job in self.back if job.due <= step)
            if self.back and self.back[0].due <= step
            else 0.0
        )
        if missing > EMPTY:
            began = self.now
            self._copy_back(np.inf, enough=missing)
            self.now = max(self.now, self.back_at)
            self.stalls[Stall.PREFETCH] += self.now - began
            self._copy_out(self.now)
        while self.back and self.back[0].due <= step:
            self.early -= self.back.popleft().size
        self.early = max(self.early, 0.0)

    def _run(self, step: int, wanted_early: float) -> None:
        recompute = float(self.extra[step])
        if recompute:
            self.events.append(Event(Stream.COMPUTE, RECOMPUTE, self.now, self.now + recompute))
        self.events.append(
            Event(Stream.COMPUTE, f"step {step}", self.now + recompute, self.now + recompute + self.p.seconds[step])
        )
        end = self.now + recompute + self.p.seconds[step]
        self._copy_out(end)
        self._copy_back(end, wanted_early=wanted_early)
        self.now = end
        self.computed += recompute + self.p.seconds[step]
        for a in self.produced.get(step, ()):
            if a.name in self.out_by_name:
                self.out_by_name[a.name].released = self.now

    def _copy_out(self, until: float, enough: float = np.inf) -> None:
        """Run the D2H engine to `until`, or until `enough` bytes have left."""
        while self.out and enough > EMPTY:
            job = self.out[0]
            start = max(self.out_at, job.released)
            if start >= until:
                break
            moved = min(job.remaining, enough, (until - start) * self.p.d2h)
            self.out_at = start + moved / self.p.d2h
            self._record(Stream.D2H, job, start, self.out_at, moved)
            enough -= moved
            if job.remaining <= EMPTY:
                self.out.popleft()
        self.out_at = max(self.out_at, until) if np.isfinite(until) else self.out_at

    def _copy_back(self, until: float, wanted_early: float = 0.0, enough: float | None = None) -> None:
        """Run the H2D engine to `until`: until `wanted_early` bytes are there early, or `enough` more."""
        wanted = max(0.0, wanted_early - self.early) if enough is None else enough
        for job in self.back:
            if wanted <= EMPTY:
                break
            source = self.out_by_name[job.name]
            if source.remaining > EMPTY:  # its own offload comes first
                if enough is None:
                    break
                self._copy_out(
                    np.inf, enough=source.remaining + sum(j.remaining for j in self.out if j.due < source.due)
                )
                self.back_at = max(self.back_at, self.out_at)
            start = max(self.back_at, self.now)
            moved = min(job.remaining, wanted, (until - start) * self.p.h2d)
            if moved <= 0:
                if job.remaining > EMPTY:
                    break
                continue
            self.back_at = start + moved / self.p.h2d
            self._record(Stream.H2D, job, start, self.back_at, moved)
            self.early += moved
            wanted -= moved
        if np.isfinite(until):
            self.back_at = max(self.back_at, until)

    def _record(self, stream: Stream, job: _Job, start: float, end: float, moved: float) -> None:
        if job.began < 0:
            job.began = start
        job.remaining -= moved
        if job.remaining <= EMPTY:
            job.remaining = 0.0
        last = self.events[-1] if self.events else None
        if last and last.stream is stream and last.name == job.name and abs(last.end - start) < 1e-12:
            self.events[-1] = Event(stream, job.name, last.start, end, last.bytes + int(moved))
        else:
            self.events.append(Event(stream, job.name, start, end, int(moved)))

    def _drain(self) -> None:
        """A step is over when its copies are: nothing offloaded is left behind."""
        if self.out:
            self._copy_out(np.inf)

    def _result(self) -> Simulation:
        moved = sum(_offloaded_bytes(a, self.residency) for a in self.p.activations)
        copies = [e for e in self.events if e.stream is not Stream.COMPUTE]
        busy = sum(e.end - e.start for e in copies)
        peak = max((held for _, held in self.memory), default=0)
        return Simulation(
            seconds=self.now,
            compute_seconds=sum(self.p.seconds),
            recompute_seconds=float(self.extra.sum()),
            stalls=dict(self.stalls),
            peak=peak,
            fits=peak <= self.budget * (1 + 1e-6) + 1,
            offloaded_bytes=int(moved),
            prefetched_bytes=int(moved),
            overlap=_overlap(copies, [e for e in self.events if e.stream is Stream.COMPUTE]) / busy if busy else 1.0,
            memory=tuple(self.memory),
            events=tuple(self.events),
        )


def _due(a: Activation) -> tuple[int, int]:
    return a.last_forward, a.produced


def _needed(a: Activation) -> int:
    return max(a.first_backward, a.last_forward + 1)


def _offloaded_bytes(a: Activation, residency: Mapping[str, Residency]) -> float:
    return a.bytes * residency[a.name].offloaded / a.tokens


def _overlap(copies: list[Event], compute: list[Event]) -> float:
    """Seconds of the copies during which something was computed."""
    edges = np.array([(e.start, e.end) for e in compute if e.end > e.start])
    if not len(edges):
        return 0.0
    busy = np.concatenate(([0.0], np.cumsum(edges[:, 1] - edges[:, 0])))

    def computed_until(at: float) -> float:
        i = int(np.searchsorted(edges[:, 0], at, side="right")) - 1
        return 0.0 if i < 0 else float(busy[i] + min(at, edges[i, 1]) - edges[i, 0])

    return sum(computed_until(e.end) - computed_until(e.start) for e in copies)
