"""Adds each term of a long sum of matmuls, or of reductions, when it comes.

Inductor keeps `a + b` as a formula until something needs it in memory. A sum that grows matmul by matmul, such as the
weight gradient of a loss that is computed chunk by chunk, then becomes one kernel after the last matmul, and every
term lies there until it runs. Reductions are small, but what they read is not: the bias gradient of a layer that is
used again and again would be one kernel that reads all of its outputs' gradients, after the last.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import is_tensor
from memo_compile.passes.fx.build import call
from memo_compile.passes.fx.facts import MATMULS, is_view, nbytes, schema_name
from memo_compile.passes.fx.provenance import provenance

ADDS = 3  # in one sum, at least: the three gradients of queries, keys and values may be added at once
SMALL = 2**20  # bytes
TermIn = Callable[[fx.Node, fx.Node | None], fx.Node | None]
_CASTS = frozenset({torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default})


def add_as_they_come(gm: fx.GraphModule) -> fx.GraphModule:
    """Put every partial sum of a long sum of matmuls or of reductions in memory, all but the last."""
    seen: set[fx.Node] = set()
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        for term_in, kind in ((_matmul_in, "matmuls"), (_reduction_in, "reductions")):
            sums = _sums_from(node, term_in) if node not in seen else []
            seen.update(sums)
            if len(sums) < ADDS or _held(sums, term_in) < SMALL:
                continue
            first = [] if term_in is _matmul_in else _first_reduction(sums[0])
            for made in [*first, *sums[:-1]]:
                with provenance(gm, f"a partial sum of {kind} in memory"), gm.graph.inserting_after(made):
                    kept = call(gm.graph, torch.ops.memo.keep.default, (made,))
                made.replace_all_uses_with(kept, delete_user_cb=partial(operator.is_not, kept))
    gm.recompile()
    return gm


def is_partial(node: fx.Node) -> bool:
    """Whether a node, of the graph or of what Inductor made of it, is such a partial sum, or the first reduction."""
    if node.target is not torch.ops.memo.keep.default:
        return False
    (kept, *_) = node.all_input_nodes
    return kept.target is torch.ops.aten.add.Tensor or schema_name(kept) == "aten::sum"


def _first_reduction(node: fx.Node) -> list[fx.Node]:
    """Of the two reductions that a first addition may add, the one that was there first."""
    reductions = _reductions(node, None)
    return sorted(reductions)[:1] if len(reductions) == 2 else []


def _sums_from(node: fx.Node, term_in: TermIn) -> list[fx.Node]:
    """The additions of one sum from `node` on, each of which adds a term to what only it reads."""
    sums = [node] if term_in(node, None) is not None else []
    while sums and len(sums[-1].users) == 1:
        (user,) = sums[-1].users
        term = term_in(user, sums[-1])
        if user.target is not torch.ops.aten.add.Tensor or term is None:
            break
        sums.append(user)
    return sums


def _held(sums: Sequence[fx.Node], term_in: TermIn) -> int:
    """Bytes that would lie there until the last addition: of one matmul, or of what all reductions read."""
    if term_in is _matmul_in:
        return nbytes(sums[0])
    terms = [term_in(node, before) for before, node in zip([None, *sums], sums, strict=False)]
    return sum(nbytes(term.all_input_nodes[0]) for term in terms if term is not None)


def _matmul_in(node: fx.Node, beside: fx.Node | None) -> fx.Node | None:
    """The matmul, cast or not, that an addition adds to `beside`, and that nothing else reads."""
    found = (_alone(term, lambda n: n.target in _CASTS) for term in _terms(node, beside))
    return next((made for made in found if made is not None and schema_name(made) in MATMULS), None)


def _reduction_in(node: fx.Node, beside: fx.Node | None) -> fx.Node | None:
    """The reduction, cast and viewed or not, that an addition adds to `beside`, and that nothing else reads."""
    return next(iter(_reductions(node, beside)), None)


def _reductions(node: fx.Node, beside: fx.Node | None) -> list[fx.Node]:
    found = (_alone(term, lambda n: n.target in _CASTS or is_view(n)) for term in _terms(node, beside))
    return [made for made in found if made is not None and schema_name(made) == "aten::sum"]


def _terms(node: fx.Node, beside: fx.Node | None) -> list[fx.Node]:
    """What an addition adds to `beside`, of its own shape."""
    terms = [a for a in node.args[:2] if isinstance(a, fx.Node) and a is not beside]
    # What a region is called with has no value: its graph, by name.
    return [a for a in terms if is_tensor(a) and is_tensor(node) and a.meta["val"].shape == node.meta["val"].shape]


def _alone(term: fx.Node, through: Callable[[fx.Node], bool]) -> fx.Node | None:
    """What makes a term, past single values that let it `through`, where nothing else reads any of them."""
    while through(term) and len(term.users) == 1 and isinstance(term.args[0], fx.Node):
        term = term.args[0]
    return term if len(term.users) == 1 else None
