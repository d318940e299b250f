"""What this process has compiled: its plans, and the shapes that each frame has been given."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from memo_compile.schema import Plan

MAX_PLANS = 512  # older ones are forgotten, so that a long process does not grow

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Registry:
    """Plans, newest last, shapes by the code object that Dynamo compiled, and into how many graphs a function fell.

    Safe to use from several threads. Functions are known by their `id`.
    """

    plans: list[Plan] = field(default_factory=list)
    shapes: dict[Any, list[Shapes]] = field(default_factory=dict)
    graphs: dict[int, int] = field(default_factory=dict)
    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_name(self) -> str:
        """A name for the next graph, unique in this process."""
        with self.lock:
            name = f"graph_{self.count}"
            self.count += 1
            return name

    def add(self, plan: Plan) -> None:
        """Record a plan; it replaces one of the same name."""
        with self.lock:
            others = [p for p in self.plans if p.name != plan.name]
            self.plans = [*others[1 - MAX_PLANS :], plan]

    def named(self, name: str) -> Plan | None:
        """The plan of that name, if it is still known."""
        with self.lock:
            return next((p for p in reversed(self.plans) if p.name == name), None)

    def clear(self) -> None:
        """Forget everything but the running number."""
        with self.lock:
            self.plans, self.shapes, self.graphs = [], {}, {}


@cache
def registry() -> Registry:
    """The process's registry."""
    return Registry()


def _lock_anew() -> None:
    """In a forked child: a thread that is not there may hold the lock. What is known here is true of the child, too."""
    registry().lock = threading.Lock()


os.register_at_fork(after_in_child=_lock_anew)
