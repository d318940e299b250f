"""Ops whose lifetimes and aliases torch and memo know least of, and for which a comparison is worth a step's time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

_TORCHS = frozenset({"aten", "prims", "prim", "inductor", "rngprims", "memo"})


def unusual_ops(gm: fx.GraphModule) -> list[str]:
    """Higher-order ops, custom ops and collectives that a graph calls, each once, in order."""
    return list(dict.fromkeys(_unusual(gm)))


def on_streams(gm: fx.GraphModule) -> fx.Node | None:
    """The first node that a user's stream runs, or that makes streams wait; None where one stream runs all.

    `torch/_functorch/_aot_autograd/streams.py` writes both.
    """
    return next(
        (
            node
            for node in gm.graph.nodes
            if getattr(node.target, "namespace", "") == "streams" or "stream" in (node.meta.get("custom") or {})
        ),
        None,
    )


def _unusual(gm: fx.GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) or (
            isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _TORCHS
        ):
            yield node.target.name()
