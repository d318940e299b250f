"""Shares the tokens of a joint graph out over ranks: sequence parallelism, after DeepSpeed-Ulysses (arXiv 2309.14509).

Every rank is given all inputs, and computes its rows of whatever has tokens. What is made from data alone (labels,
positions, masks) it makes row by row too where activations read rows of it, and whole where it is read whole. Attention
stands between two all-to-alls: all tokens of some heads for some tokens of all heads, and back. What sums over tokens
(the loss, gradients of weights) is a partial sum on each rank, and an all-reduce. An op that reads other tokens in
another way is refused.

Each value has up to three versions here: `whole`, its `rows` on this rank, and all rows of this rank's `heads`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from memo_compile.errors import NotShareable
from memo_compile.models import collectives as collectives  # defines the ops
from memo_compile.passes.analysis.tile_rows import Rows, is_constant, tile_rows
from memo_compile.passes.analysis.token_axis import TokenAxis, is_tensor, shape_of
from memo_compile.passes.analysis.token_sums import SUMS, Needs, is_mean
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.build import call, reshape, told
from memo_compile.passes.fx.facts import op_name, schema_name, source_line
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.transforms.token_slices import sliced_copy

ATTENTIONS = frozenset(
    f"aten::_scaled_dot_product_{kind}{backward}"
    for kind, backward in (
        ("flash_attention", ""),
        ("flash_attention", "_backward"),
        ("flash_attention_for_cpu", ""),
        ("flash_attention_for_cpu", "_backward"),
        ("efficient_attention", ""),
        ("efficient_attention", "_backward"),
        ("cudnn_attention", ""),
        ("cudnn_attention", "_backward"),
    )
)
SAME = frozenset({"aten::detach", "aten::alias"})
HEADS, SEQUENCE = 1, 2  # dimensions of (batch, heads, tokens, size), as attention takes it


@dataclass(frozen=True)
class Part:
    """A rank's part of all tokens: one of `ranks` in the process group called `group`. Which one no graph says."""

    group: str
    ranks: int


def share_tokens(joint: fx.GraphModule, data: Sequence[fx.Node], part: Part) -> None:
    """Rewrite a joint graph, with its token axes annotated, so that this rank computes its part of the tokens.

    Args:
        joint: forward and backward, with numbers for sizes; its inputs and results stay as they are.
        data: the placeholders that hold data: tokens, labels, masks, or activations.
        part: which tokens are this rank's.

    Raises:
        NotShareable: an op reads other tokens and is no attention, or tokens or heads are no multiple of the ranks.
    """
    _mark_gradients_of_attention(joint)
    shares = _Shares(fx.Graph(), part, _activations(joint, data), tile_rows(joint))
    for node in joint.graph.find_nodes(op="placeholder"):
        shares.wholes[node] = shares.graph.node_copy(node)
    for node in joint.graph.nodes:
        if node.op == "get_attr":
            shares.wholes[node] = shares.graph.node_copy(node)
        elif node.op == "call_function" and not _made_on_demand(node):
            # In the order of the graph, which is that in which memory is to be had.
            shares.rows(node) if node in shares.activations and shares.axis(node) else shares.whole(node)
        elif node.op == "output":
            results = fx.node.map_arg(node.args, shares.result)
            copy = shares.graph.output(results[0])
            copy.meta.update(node.meta)
    shares.graph.eliminate_dead_code()
    joint.graph = shares.graph
    joint.recompile()


def _activations(joint: fx.GraphModule, data: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """What is made from data and from parameters, and so what is worth sharing out; data that are activations too."""
    from_data, others = set(data), {n for n in joint.graph.find_nodes(op="placeholder") if n not in set(data)}
    found = {n for n in data if is_tensor(n) and n.meta["val"].is_floating_point() and TOKENS in n.meta}
    for node in joint.graph.nodes:
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes
        if any(a in from_data for a in sources):
            from_data.add(node)
        if any(a in others for a in sources):
            others.add(node)
        if any(a in found for a in sources) or (node in from_data and node in others):
            found.add(node)
    return frozenset(found)


def _of_attention(node: fx.Node) -> bool:
    return schema_name(node) in ATTENTIONS


def _item_of_attention(node: fx.Node) -> bool:
    return node.target is operator.getitem and _of_attention(node.all_input_nodes[0]) and is_tensor(node)


def _source(node: fx.Node) -> fx.Node:
    """What a value is another name of."""
    while schema_name(node) in SAME:
        (node,) = node.all_input_nodes
    return node


def _mark_gradients_of_attention(joint: fx.GraphModule) -> None:
    """Those of queries, keys and values have their tokens where these have."""
    for node in joint.graph.nodes:
        if _item_of_attention(node) and TOKENS not in node.meta and len(shape_of(node)) == SEQUENCE + 2:
            axis = TokenAxis(SEQUENCE, 1, shape_of(node)[SEQUENCE], 1)
            node.meta[TOKENS] = TokenInfo(axis=axis, operands=(None,), sliceable=False, mixing=True, reason="attention")


def _made_on_demand(node: fx.Node) -> bool:
    """Which version is wanted of these their readers say."""
    return _of_attention(node) or _item_of_attention(node)


def _joined_with_nothing(node: fx.Node) -> fx.Node | None:
    """The one operand of a concatenation that has elements, as where a cache of keys is empty yet."""
    if schema_name(node) != "aten::cat":
        return None
    full = [a for a in node.all_input_nodes if 0 not in shape_of(a)]
    return full[0] if len(full) == 1 and shape_of(full[0]) == shape_of(node) else None


@dataclass(frozen=True)
class _Shares:
    """The graph that is built, and the versions that nodes of the first one have there so far."""

    graph: fx.Graph
    part: Part
    activations: frozenset[fx.Node]
    known: Mapping[fx.Node, Rows]
    wholes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    some_rows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    some_heads: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def axis(self, node: fx.Node) -> TokenAxis | None:
        """The token axis of a value; None where it has none, as a sum over tokens."""
        if node in self.known:
            return None if self.known[node].summed else self.known[node].axis
        return node.meta[TOKENS].axis if TOKENS in node.meta else None

    def whole(self, node: fx.Node) -> fx.Node:
        """All of a value. Sums over tokens become sums over ranks."""
        if node not in self.wholes:
            self.wholes[node] = self._whole(node)
        return self.wholes[node]

    def _whole(self, node: fx.Node) -> fx.Node:
        if node not in self.activations:
            return self.graph.node_copy(node, self.whole)
        if self.axis(node) is not None or _of_attention(node):
            raise NotShareable(f"a later op reads all tokens of {op_name(node)}", source_line(node))
        if not any(a in self.activations and a not in self.wholes and self.axis(a) for a in node.all_input_nodes):
            return self.graph.node_copy(node, self.whole)
        needs = self._summed(node)
        if needs is None:
            raise NotShareable(f"{op_name(node)} reads all tokens", source_line(node))
        args: Any = fx.node.map_arg(node.args, lambda a: self.rows(a, needs[a]) if a in needs else self.whole(a))
        total = self._added(told(call(self.graph, node.target, args, dict(node.kwargs)), node))
        return self._aten("div", total, self.part.ranks, overload="Tensor") if is_mean(node) else total

    def _summed(self, node: fx.Node) -> Needs | None:
        """Of a sum over tokens, the operands of which rows are read; None where it is no such sum."""
        if node in self.known and self.known[node].summed:
            operands, needs = node.all_input_nodes, self.known[node].needs
            return {a: need for a, need in zip(operands, needs, strict=True) if need is not None}
        rule = SUMS.get(schema_name(node))
        return rule(node, self.axis) if rule is not None else None

    def rows(self, node: fx.Node, axis: TokenAxis | None = None) -> fx.Node:
        """This rank's rows of a value along its axis, or one that is asked for."""
        axis = axis or self.axis(node)
        assert axis is not None
        own = self.axis(node)
        if node not in self.activations:
            return self._rows_of_data(node, axis)
        if own != axis:
            raise NotShareable(f"{op_name(node)} has its tokens in another dimension", source_line(node))
        if node not in self.some_rows:
            self.some_rows[node] = self._rows(node, axis)
        return self.some_rows[node]

    def _count(self, axis: TokenAxis, node: fx.Node) -> int:
        """Tokens of a rank."""
        part, remainder = divmod(axis.tokens, self.part.ranks)
        if remainder:
            raise NotShareable(f"{axis.tokens} tokens are no multiple of {self.part.ranks} ranks", source_line(node))
        return part

    def _mine(self, whole: fx.Node, axis: TokenAxis) -> fx.Node:
        """This rank's rows of a value that all ranks have."""
        shape = list(shape_of(whole))
        if axis.outer == 1:
            return self._shard(whole, axis.dim)
        unfolded = [*shape[: axis.dim], axis.outer, shape[axis.dim] // axis.outer, *shape[axis.dim + 1 :]]
        mine = self._shard(reshape(self.graph, whole, unfolded), axis.dim + 1)
        shape[axis.dim] //= self.part.ranks
        return reshape(self.graph, mine, shape)

    def _rows_of_data(self, node: fx.Node, axis: TokenAxis) -> fx.Node:
        """They are made row by row where they can be: as wide as logits, nobody wants the whole (a loss's targets)."""
        count = self._count(axis, node)
        if is_constant(node):
            return self._constant(node, axis)
        if node.op != "call_function" or self.axis(node) != axis or not self._keeps_tokens(node, axis):
            return self._mine(self.whole(node), axis)
        if node not in self.some_rows:
            self.some_rows[node] = self._by_rows(node, axis, count)
        return self.some_rows[node]

    def _keeps_tokens(self, node: fx.Node, axis: TokenAxis) -> bool:
        """Whether rows are made of the same rows. Of another number of tokens (`x[:, :n]`) this rank has other ones."""
        return node in self.known and all(n is None or n.tokens == axis.tokens for n in self.known[node].needs)

    def _constant(self, node: fx.Node, axis: TokenAxis) -> fx.Node:
        """So many rows of one number, which no rank has whole."""
        sizes = list(shape_of(node))
        sizes[axis.dim] //= self.part.ranks
        return call(self.graph, node.target, (sizes, *node.args[1:]), dict(node.kwargs))

    def _shard(self, whole: fx.Node, dim: int) -> fx.Node:
        op: Any = torch.ops.memo_collectives.shard.default
        return call(self.graph, op, (whole, dim, self.part.ranks, self.part.group))

    def _rows(self, node: fx.Node, axis: TokenAxis) -> fx.Node:
        count = self._count(axis, node)
        if node.op == "placeholder":
            return self._mine(self.wholes[node], axis)
        if _item_of_attention(node):
            return _like(self.graph, node, self._fewer_heads(self._to_tokens(self.heads(node)), shape_of(node)[HEADS]))
        if (only := _joined_with_nothing(node)) is not None:
            return self.rows(only, axis)
        if node not in self.known:
            raise NotShareable(f"{op_name(node)} reads other tokens", source_line(node))
        if not self._keeps_tokens(node, axis):
            raise NotShareable(f"{op_name(node)} leaves tokens out, or adds some", source_line(node))
        return self._by_rows(node, axis, count)

    def _by_rows(self, node: fx.Node, axis: TokenAxis, count: int) -> fx.Node:
        needs = self.known[node].needs
        info = TokenInfo(axis=axis, operands=needs, sliceable=True, mixing=False, reason="")
        operands = zip(node.all_input_nodes, needs, strict=True)
        args = {a: self.whole(a) if need is None else self.rows(a, need) for a, need in operands}
        return sliced_copy(self.graph, node, info, args, 0, count)

    def heads(self, node: fx.Node) -> fx.Node:
        """All tokens of this rank's heads of a value: (batch, heads / ranks, tokens, size)."""
        if node not in self.some_heads:
            self.some_heads[node] = self._heads(node)
        return self.some_heads[node]

    def _heads(self, node: fx.Node) -> fx.Node:
        if _of_attention(node):
            return self._attention(node)
        if _item_of_attention(node):
            return call(self.graph, operator.getitem, (self.heads(node.all_input_nodes[0]), node.args[1]))
        if schema_name(node) in SAME and _item_of_attention(_source(node)):
            return call(self.graph, node.target, (self.heads(node.all_input_nodes[0]),))
        axis = self.axis(node)
        if len(shape_of(node)) != SEQUENCE + 2 or axis != TokenAxis(SEQUENCE, 1, shape_of(node)[SEQUENCE], 1):
            raise NotShareable(f"attention of {op_name(node)}, which has no tokens at dimension 2", source_line(node))
        return self._to_heads(self.rows(node), node)

    def _attention(self, node: fx.Node) -> fx.Node:
        """The op on this rank's heads. Its kernel sees all tokens, so that masks and causality are as they were."""
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("dropout_p", 0.0):
            raise NotShareable("attention with dropout draws other numbers on each rank", source_line(node))
        args: Any = fx.node.map_arg(node.args, self._operand)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._operand)
        return told(call(self.graph, node.target, args, kwargs), node)

    def _operand(self, node: fx.Node) -> fx.Node:
        """An operand of attention: a mask is whole, for one head or all; of heads it has this rank's."""
        if node in self.activations and (self.axis(node) is not None or _item_of_attention(node)):
            return self.heads(node)
        whole = self.whole(node)
        if not is_tensor(node) or len(shape_of(node)) != SEQUENCE + 2 or shape_of(node)[HEADS] == 1:
            return whole
        return self._shard(whole, HEADS)

    # Where there are fewer heads of keys and values than ranks, each rank has a copy of the one that its queries read.

    def _more_heads(self, rows: fx.Node) -> fx.Node:
        batch, heads, tokens, size = shape_of(rows)
        copies, remainder = divmod(self.part.ranks, heads)
        if remainder or copies < 2:
            return rows
        wide = self._aten("expand", self._aten("unsqueeze", rows, 2), [batch, heads, copies, tokens, size])
        return reshape(self.graph, wide, [batch, heads * copies, tokens, size])

    def _fewer_heads(self, rows: fx.Node, heads: int) -> fx.Node:
        """Gradients of copies are added up."""
        batch, copied, tokens, size = shape_of(rows)
        if copied == heads:
            return rows
        wide = reshape(self.graph, rows, [batch, heads, copied // heads, tokens, size])
        return self._aten("sum", wide, [2], overload="dim_IntList")

    # Each all-to-all sends a block to every rank: the blocks stand in dimension 0.

    def _to_heads(self, rows: fx.Node, node: fx.Node) -> fx.Node:
        rows = self._more_heads(rows)
        batch, heads, tokens, size = shape_of(rows)
        ranks = self.part.ranks
        if heads % ranks:
            raise NotShareable(f"{heads} heads are no multiple of {ranks} ranks", source_line(node))
        blocks = reshape(self.graph, rows, [batch, ranks, heads // ranks, tokens, size])
        got = self._swapped(self._aten("permute", blocks, [1, 0, 2, 3, 4]))  # (from rank, batch, heads, tokens, size)
        joined = self._aten("permute", got, [1, 2, 0, 3, 4])
        return reshape(self.graph, joined, [batch, heads // ranks, ranks * tokens, size])

    def _to_tokens(self, heads: fx.Node) -> fx.Node:
        batch, mine, tokens, size = shape_of(heads)
        ranks = self.part.ranks
        blocks = reshape(self.graph, heads, [batch, mine, ranks, tokens // ranks, size])
        got = self._swapped(self._aten("permute", blocks, [2, 0, 1, 3, 4]))
        joined = self._aten("permute", got, [1, 0, 2, 3, 4])
        return reshape(self.graph, joined, [batch, ranks * mine, tokens // ranks, size])

    def _swapped(self, blocks: fx.Node) -> fx.Node:
        """Block i of dimension 0 goes to rank i."""
        shape = list(shape_of(blocks))
        dense = call(self.graph, torch.ops.aten.clone.default, (blocks,), {"memory_format": torch.contiguous_format})
        flat = reshape(self.graph, dense, [-1])
        sizes = [flat.meta["val"].numel() // self.part.ranks] * self.part.ranks
        functional: Any = torch.ops._c10d_functional
        sent = call(self.graph, functional.all_to_all_single.default, (flat, sizes, sizes, self.part.group))
        return reshape(self.graph, self._waited(sent), shape)

    def _added(self, partial: fx.Node) -> fx.Node:
        """The sum over ranks."""
        functional: Any = torch.ops._c10d_functional
        return self._waited(call(self.graph, functional.all_reduce.default, (partial, "sum", self.part.group)))

    def result(self, node: fx.Node) -> fx.Node:
        """What is returned is returned whole, on every rank."""
        axis = self.axis(node)
        if node not in self.activations or axis is None or node in self.wholes:
            return self.whole(node)
        if axis.outer != 1:
            raise NotShareable(f"{op_name(node)} is returned with its tokens within a dimension", source_line(node))
        order = list(range(len(shape_of(node))))
        order[0], order[axis.dim] = axis.dim, 0
        first = self._aten("permute", self.rows(node), order)
        dense = call(self.graph, torch.ops.aten.clone.default, (first,), {"memory_format": torch.contiguous_format})
        functional: Any = torch.ops._c10d_functional
        gather = functional.all_gather_into_tensor.default
        everyone = self._waited(call(self.graph, gather, (dense, self.part.ranks, self.part.group)))
        return _like(self.graph, node, self._aten("permute", everyone, order))

    def _waited(self, started: fx.Node) -> fx.Node:
        functional: Any = torch.ops._c10d_functional
        return call(self.graph, functional.wait_tensor.default, (started,))

    def _aten(self, name: str, *args: Any, overload: str = "default") -> fx.Node:
        return call(self.graph, getattr(getattr(torch.ops.aten, name), overload), args)


def _like(graph: fx.Graph, node: fx.Node, made: fx.Node) -> fx.Node:
    """A value with its dimensions in memory in the order that `node` has: later views rely on it."""
    strides = node.meta["val"].stride()
    order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
    aten = torch.ops.aten
    dense = call(graph, aten.permute.default, (made, order))
    dense = call(graph, aten.clone.default, (dense,), {"memory_format": torch.contiguous_format})
    return call(graph, aten.permute.default, (dense, [order.index(d) for d in range(len(order))]))
