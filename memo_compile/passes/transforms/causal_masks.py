"""Tells fused attentions that their mask is causal, or hides nothing, where it always does: these then read none.

A mask holds as many numbers as tokens squared; what a causal one hides is not computed without it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.known_masks import Mask, known_mask
from memo_compile.passes.analysis.token_axis import shape_of
from memo_compile.passes.fx.facts import argument
from memo_compile.passes.fx.meta import WHY
from memo_compile.passes.transforms.masks import MASKS, mask_of


def say_causal(gm: fx.GraphModule) -> fx.GraphModule:
    """Take masks that are causal, or zero, out of fused attentions, forward and backward.

    Masks that nothing reads any more stay in the graph: they may be what torch would save.
    """
    found: dict[fx.Node, Mask | None] = {}
    for node in gm.graph.nodes:
        mask = mask_of(node)
        if mask is None or argument(node, "is_causal") is not False or not _is_square(node):
            continue
        if mask not in found:
            found[mask] = known_mask(mask)
        known = found[mask]
        if known is not None:
            _without(node, known)
    gm.recompile()
    return gm


def _is_square(node: fx.Node) -> bool:
    """Whether there are as many keys as queries, so that kernels agree on which is whose."""
    query, key = argument(node, "query"), argument(node, "key")
    rows = [shape_of(n)[-2] for n in (query, key) if isinstance(n, fx.Node)]
    return len(rows) == 2 and rows[0] == rows[1]


def _without(node: fx.Node, mask: Mask) -> None:
    """The same call without a mask."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    told: dict[str, Any] = {**dict.fromkeys(MASKS), "is_causal": mask is Mask.CAUSAL}
    plain = [a.name for a in target._schema.arguments if not a.kwarg_only]
    plain = plain[: max(len(node.args), plain.index("is_causal") + 1)]
    args: Any = tuple(told[name] if name in told else argument(node, name) for name in plain)
    node.args = args
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in (*plain, *told)}
    node.meta[WHY] = f"its mask, whatever the inputs are, hides {mask.value}: none is read"
