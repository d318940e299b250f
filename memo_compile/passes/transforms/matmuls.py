"""Keeps matmuls where the plan has them.

Inductor fuses `add(mm(a, b), c)` into `addmm(c, a, b)` at the place of the sum
(torch/_inductor/fx_passes/post_grad.py). Where `c` comes much later, `a` and `b` are held until then: with a tied
embedding the logits' gradient, which is the largest tensor of many models, would live through the whole backward.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from memo_compile.passes.fx.build import call

FAR = 16  # nodes between a matmul and its sum: beyond that its operands would be held for long


def keep_early_matmuls(gm: fx.GraphModule) -> fx.GraphModule:
    """Put a view between each matmul and a sum that comes much later: Inductor then fuses neither with the other."""
    graph = gm.graph
    position = {n: i for i, n in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        for matmul in node.all_input_nodes:
            if not _is_matrix(node) or matmul.target is not torch.ops.aten.mm.default:
                continue
            if position[node] - position[matmul] > FAR:
                with graph.inserting_before(node):
                    node.replace_input_with(matmul, call(graph, torch.ops.aten.unsqueeze.default, (matmul, 0)))
                with graph.inserting_after(node):
                    whole = graph.call_function(torch.ops.aten.squeeze.dim, (node, 0))
                whole.meta["val"] = node.meta["val"]
                node.meta["val"] = whole.meta["val"].unsqueeze(0)
                node.replace_all_uses_with(whole, delete_user_cb=lambda user, w=whole: user is not w)
                break
    gm.recompile()
    return gm


def _is_matrix(node: fx.Node) -> bool:
    """Of a sum: with a third dimension Inductor makes no `addmm` of it."""
    value: torch.Tensor = node.meta["val"]
    return value.dim() == 2
