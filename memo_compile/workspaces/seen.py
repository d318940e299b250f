"""What ops were seen to take in first steps of this process, by op and shapes: what no formula and no call tells."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.fx as fx

from memo_compile.passes.fx.facts import schema_name
from memo_compile.workspaces.recording import Key


@dataclass
class Seen:
    """Bytes by op and shapes of its operands. Safe to use from several threads."""

    bytes: dict[Key, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, taken: Mapping[Key, int]) -> None:
        """Keep the most that each op was seen to take."""
        with self.lock:
            for key, size in taken.items():
                self.bytes[key] = max(size, self.bytes.get(key, 0))

    def of(self, node: fx.Node) -> int | None:
        """What the node's op was seen to take at its shapes; None where it was not."""
        with self.lock:
            return self.bytes.get(key_of(node))


@cache
def seen() -> Seen:
    """The process's record."""
    return Seen()


def _lock_anew() -> None:
    """In a forked child: a thread that is not there may hold the lock. What was seen is true of the child, too."""
    seen().lock = threading.Lock()


os.register_at_fork(after_in_child=_lock_anew)


def key_of(node: fx.Node) -> Key:
    """The node's op and the shapes of its operands that are tensors, as the profiler tells them."""
    name = schema_name(node) or str(node.target)
    values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in (*node.args, *node.kwargs.values())]
    shapes = (tuple(int(s) for s in v.shape) for v in values if isinstance(v, torch.Tensor))
    return name, tuple(s for s in shapes if s)
