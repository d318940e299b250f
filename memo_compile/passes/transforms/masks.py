"""Makes a mask that several fused attentions read one buffer.

Inductor keeps a pointwise value as a formula until something needs it in memory, and an attention's mask is brought
into the order that its kernel wants by a copy. So each attention of a graph makes a mask of its own, all of them where
the first is needed, since they fuse: rows times rows for each layer instead of once.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import argument, storage_of
from memo_compile.passes.fx.provenance import provenance

MASKS = ("attn_mask", "attn_bias")  # arguments of fused attentions


def share_masks(gm: fx.GraphModule) -> fx.GraphModule:
    """Put masks that are computed in this graph, and read by two attentions or more, in memory once."""
    readers: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        mask = mask_of(node)
        if mask is not None:
            made = storage_of(mask)
            readers[made] = readers.get(made, 0) + 1
    for made, count in readers.items():
        if count > 1 and _is_a_formula(made):
            with provenance(gm, f"one mask in memory for {count} attentions"), gm.graph.inserting_after(made):
                kept = call(gm.graph, torch.ops.memo.keep.default, (made,))
            made.replace_all_uses_with(kept, delete_user_cb=partial(operator.is_not, kept))
    gm.recompile()
    return gm


def mask_of(node: fx.Node) -> fx.Node | None:
    """The mask (rows, columns, with batch and heads before them) of a fused attention."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or "scaled_dot_product" not in target.__name__:
        return None
    found = [argument(node, name) for name in MASKS]
    return next((n for n in found if isinstance(n, fx.Node)), None)


def _is_a_formula(made: fx.Node) -> bool:
    """Whether Inductor would hold it in no buffer by itself, as it does what the graph returns."""
    target: Any = made.target
    pointwise = made.op == "call_function" and torch.Tag.pointwise in getattr(target, "tags", ())
    returned = any(user.op == "output" for user in made.users)
    return pointwise and not returned and made.meta["val"].is_contiguous()
