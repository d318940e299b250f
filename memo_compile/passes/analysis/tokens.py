"""Follows the token axis through a graph: `annotate_tokens` writes what it finds into `node.meta["memo_tokens"]`."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import Axes, Flow, TokenAxis, shape_of
from memo_compile.passes.analysis.token_rules import flow, is_elementwise, needs_of_pointwise, reads_nothing, sliceable
from memo_compile.passes.fx.facts import is_pure, nbytes, op_name, source_line
from memo_compile.passes.fx.meta import TOKENS


@dataclass(frozen=True)
class TokenInfo:
    """The token axis of a node's value.

    `operands` says, for each of `node.all_input_nodes`, along which axis it is sliced to compute a slice of this value
    (None: it is needed whole). `sliceable`: rows can be computed so; else `reason` says why not. `mixing`: the op reads
    across tokens, and the axis only says how the value is stored in slices.
    """

    axis: TokenAxis
    operands: tuple[TokenAxis | None, ...]
    sliceable: bool
    mixing: bool
    reason: str


@dataclass(frozen=True)
class TokenStop:
    """A node at which the axis ended."""

    node: str
    op: str
    source: str
    reason: str


@dataclass(frozen=True)
class TokenReport:
    """The chosen axis in words, its number of tokens (0: there is none), and where it ended."""

    axis: str
    tokens: int
    stops: tuple[TokenStop, ...]


def annotate_tokens(gm: fx.GraphModule, inputs: Sequence[fx.Node], dims: Collection[int] = (0, 1)) -> TokenReport:
    """Follow the token axis from the data inputs, and write `TokenInfo` to each node that it reaches.

    The axis is the dimension of the data inputs along which most bytes can be cut off, down to one token: the sequence
    at batch 1, the sequence or the batch otherwise. Of a few sequences, one by one is less than token by token.

    Args:
        gm: a joint or forward graph with static shapes.
        inputs: placeholders that hold data (no parameters).
        dims: dimensions of the data inputs that may be it.
    """
    for node in gm.graph.nodes:
        node.meta.pop(TOKENS, None)
    best: tuple[float, dict[fx.Node, TokenAxis], dict[fx.Node, TokenInfo], list[TokenStop]] | None = None
    for size, seeds in _candidates(inputs, dims):
        infos, stops = _follow(gm, seeds)
        score = sum(nbytes(n) for n, info in infos.items() if info.sliceable) * (1 - 1 / size)
        if best is None or score > best[0]:
            best = (score, seeds, infos, stops)
    if best is None:
        return TokenReport("none: no data input has a dimension that counts tokens", 0, ())
    _, seeds, infos, stops = best
    for node, info in infos.items():
        node.meta[TOKENS] = info
    dims, size = sorted({axis.dim for axis in seeds.values()}), next(iter(seeds.values())).tokens
    where = f"dimension {dims[0]}" if len(dims) == 1 else f"dimensions {' and '.join(map(str, dims))}"
    return TokenReport(f"{where} of the data inputs ({size} tokens)", size, tuple(stops))


def _candidates(inputs: Sequence[fx.Node], dims: Collection[int]) -> list[tuple[int, dict[fx.Node, TokenAxis]]]:
    """Tokens and seeds: all inputs along one dimension, or each along that of its first two which counts tokens.

    A block is given (batch, tokens, width), and tables of positions (tokens, size).
    """
    sizes = [shape_of(n)[:2] for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    alike = {(dim, size) for shape in sizes for dim, size in enumerate(shape) if size > 1}
    wanted = {(dim, size) for dim, size in alike if dim in dims}
    ordered = sorted(wanted, key=lambda c: (-c[0], -c[1]))
    mixed = sorted({size for _, size in wanted if len({dim for dim, s in alike if s == size}) > 1}, reverse=True)
    found = [(size, _seed(inputs, (dim,), size)) for dim, size in ordered]
    return found + [(size, _seed(inputs, (0, 1), size)) for size in mixed]


def _seed(inputs: Sequence[fx.Node], dims: Sequence[int], size: int) -> dict[fx.Node, TokenAxis]:
    seeds = {}
    for node in inputs:
        if isinstance(node.meta.get("val"), torch.Tensor):
            shape = shape_of(node)
            dim = next((d for d in dims if len(shape) > d and shape[d] == size), None)
            if dim is not None:
                seeds[node] = TokenAxis(dim=dim, outer=1, tokens=size, inner=1)
    return seeds


def _follow(gm: fx.GraphModule, seeds: Axes) -> tuple[dict[fx.Node, TokenInfo], list[TokenStop]]:
    axes: dict[fx.Node, TokenAxis] = dict(seeds)
    results: dict[fx.Node, tuple[TokenAxis | None, ...]] = {}
    infos: dict[fx.Node, TokenInfo] = {}
    stops: list[TokenStop] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node in axes:
            infos[node] = TokenInfo(axes[node], (), False, False, "an input")
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            _follow_item(node, axes, results, infos)
            continue
        if reads_nothing(node) or not any(a in axes or a in results for a in node.all_input_nodes):
            continue
        found = flow(node, axes)
        if isinstance(found, str):
            stops.append(TokenStop(node=node.name, op=op_name(node), source=source_line(node), reason=found))
            continue
        _record(node, found, axes, results, infos)
    _from_readers(gm, axes, infos)
    return infos, stops


def _record(
    node: fx.Node,
    found: Flow,
    axes: dict[fx.Node, TokenAxis],
    results: dict[fx.Node, tuple[TokenAxis | None, ...]],
    infos: dict[fx.Node, TokenInfo],
) -> None:
    can = sliceable(node, found)
    reason = "" if can else f"{op_name(node)} {'mixes tokens' if found.mixing else 'draws random numbers'}"
    axis = next((a for a in found.outputs if a is not None), None)
    if axis is None:
        return
    infos[node] = TokenInfo(axis, found.needs, can, found.mixing, reason)
    if isinstance(node.meta["val"], torch.Tensor):
        axes[node] = axis
    else:
        results[node] = found.outputs


def _follow_item(
    node: fx.Node,
    axes: dict[fx.Node, TokenAxis],
    results: dict[fx.Node, tuple[TokenAxis | None, ...]],
    infos: dict[fx.Node, TokenInfo],
) -> None:
    parent, index = node.args
    if not isinstance(parent, fx.Node) or parent not in results or not isinstance(index, int):
        return
    axis = results[parent][index] if index < len(results[parent]) else None
    if axis is None:
        return
    of = infos[parent]
    axes[node] = axis
    infos[node] = TokenInfo(axis, (of.axis,), of.sliceable, of.mixing, of.reason)


def _from_readers(gm: fx.GraphModule, axes: Mapping[fx.Node, TokenAxis], infos: dict[fx.Node, TokenInfo]) -> None:
    """Values that no data input reaches (masks, tables of positions) but whose rows a reader wants.

    Elementwise ones are followed up; others are at least stored in slices.
    """
    for node in reversed(gm.graph.nodes):
        info = infos.get(node)
        if info is None:
            continue
        for operand, need in zip(node.all_input_nodes, info.operands, strict=True):
            known = operand in infos or operand in axes or operand.op == "placeholder"
            if need is None or known or not isinstance(operand.meta.get("val"), torch.Tensor):
                continue
            if is_elementwise(operand) and is_pure(operand):
                infos[operand] = TokenInfo(need, needs_of_pointwise(operand, need), True, False, "")
            else:
                reason = f"{op_name(operand)} is made from no data input: its rows are not computed alone"
                infos[operand] = TokenInfo(need, (None,) * len(operand.all_input_nodes), False, False, reason)
