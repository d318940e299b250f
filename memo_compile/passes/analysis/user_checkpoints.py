"""A user's own checkpoints: what `torch.utils.checkpoint` says of the values inside of it.

Plain checkpoints, and a policy's PREFER_*, say what may be done: memo decides that for itself, value by value. A
policy's MUST_* say what is done, and are kept.

Private torch APIs, tried with torch 2.13: the marks `node.meta["recompute"]`, which AOTAutograd's partitioner reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

MARK = "recompute"


@dataclass(frozen=True)
class Policies:
    """By name, the values that must be saved, recomputed, offloaded; `suggested` tells whether others have a mark."""

    saved: frozenset[str] = frozenset()
    recomputed: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()
    suggested: bool = False

    @property
    def as_they_are(self) -> frozenset[str]:
        """Values that are saved themselves, and nothing in their place."""
        return self.saved | self.offloaded


NO_POLICIES = Policies()


def policies_of(joint: fx.GraphModule) -> Policies:
    """What the user's checkpoints say. To be asked before torch's partitioner runs, which makes marks of its own."""
    marks = {n.name: n.meta[MARK] for n in joint.graph.nodes if isinstance(n.meta.get(MARK), CheckpointPolicy)}

    def marked(policy: CheckpointPolicy) -> frozenset[str]:
        return frozenset(name for name, mark in marks.items() if mark is policy)

    must = [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.MUST_CPU_OFFLOAD]
    saved, recomputed, offloaded = map(marked, must)
    return Policies(saved, recomputed, offloaded, len(marks) > len(saved | recomputed | offloaded))


def drop_suggestions(joint: fx.GraphModule, policies: Policies) -> None:
    """Take away all marks but those of `policies`, so that torch's partitioner saves what it would without."""
    for node in joint.graph.nodes:
        node.meta.pop(MARK, None)
        if node.name in policies.as_they_are:
            node.meta[MARK] = CheckpointPolicy.MUST_SAVE
        elif node.name in policies.recomputed:
            node.meta[MARK] = CheckpointPolicy.MUST_RECOMPUTE
