"""Adds each term of a long sum of matmuls when it comes.

Inductor keeps `a + b` as a formula until something needs it in memory. A sum that grows matmul by matmul, such as the
weight gradient of a loss that is computed chunk by chunk, then becomes one kernel after the last matmul, and every
term lies there until it runs.
"""

from __future__ import annotations

import operator
from functools import partial

import torch
import torch.fx as fx

from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import MATMULS, nbytes, schema_name
from memo_compile.passes.fx.provenance import provenance

ADDS = 3  # in one sum, at least: the three gradients of queries, keys and values may be added at once
SMALL = 2**20  # bytes
_CASTS = frozenset({torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default})


def add_as_they_come(gm: fx.GraphModule) -> fx.GraphModule:
    """Put every partial sum of a long sum of matmuls in memory, all but the last."""
    seen: set[fx.Node] = set()
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        sums = _sums_from(node) if node not in seen else []
        seen.update(sums)
        if len(sums) < ADDS or nbytes(node) < SMALL:
            continue
        for made in sums[:-1]:
            with provenance(gm, "a partial sum of matmuls in memory"), gm.graph.inserting_after(made):
                kept = call(gm.graph, torch.ops.memo.keep.default, (made,))
            made.replace_all_uses_with(kept, delete_user_cb=partial(operator.is_not, kept))
    gm.recompile()
    return gm


def is_partial(node: fx.Node) -> bool:
    """Whether a node, of the graph or of what Inductor made of it, is such a partial sum."""
    kept = node.all_input_nodes
    return node.target is torch.ops.memo.keep.default and kept[0].target is torch.ops.aten.add.Tensor


def _sums_from(node: fx.Node) -> list[fx.Node]:
    """The additions of one sum from `node` on, each of which adds a matmul to what only it reads."""
    sums = [node] if _matmul_in(node) is not None else []
    while sums and len(sums[-1].users) == 1:
        (user,) = sums[-1].users
        term = _matmul_in(user, beside=sums[-1])
        if user.target is not torch.ops.aten.add.Tensor or term is None:
            break
        sums.append(user)
    return sums


def _matmul_in(node: fx.Node, beside: fx.Node | None = None) -> fx.Node | None:
    """The matmul, cast or not, that an addition adds to `beside`, and that nothing else reads."""
    for term in node.args[:2]:
        if not isinstance(term, fx.Node) or term is beside:
            continue
        made = term
        while made.target in _CASTS and len(made.users) == 1 and isinstance(made.args[0], fx.Node):
            made = made.args[0]
        if schema_name(made) in MATMULS and len(made.users) == 1 and term.meta["val"].shape == node.meta["val"].shape:
            return made
    return None
