"""Graphs for a range of lengths: numbers at its upper end beside symbols, and nodes that compute sizes.

Decisions are made on a twin of the symbolic graph whose sizes are numbers; what they come to is carried out on the
symbolic graph itself. Rows of a slice are a fraction of the length: row n of N at the upper end is row L * n // N of L,
so that every part of a value is largest where the length is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.sizes import is_symbolic, known, largest, sizes_of, symbols_of


class NoRange(BaseException):
    """Ends a compilation for a range of lengths: the length at hand is compiled alone. Nothing wraps it."""


class NothingPlanned(BaseException):
    """Ends a compilation for a range of lengths in which nothing is to be done: the graph is Inductor's as it is."""


def has_symbols(gm: fx.GraphModule) -> bool:
    """Whether any size in the graph is a symbol."""
    return any(is_symbolic(size) for node in gm.graph.nodes for size in sizes_of([node.meta.get("val")]))


def twin_at(gm: fx.GraphModule, values: Mapping[Any, int]) -> fx.GraphModule:
    """A copy of a graph in which each symbol has a value, and each size is a number.

    Nodes keep their names. What computed sizes is gone, but for the inputs that are symbols.
    """
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    mode = _fake_mode(gm)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            made[node] = number_at(value, values)
            continue
        copy = graph.node_copy(node, lambda n: made[n])
        copy.meta = {**node.meta, "val": _at(value, values, mode)}
        made[node] = copy
        if node.op == "placeholder" and isinstance(value, (torch.SymInt, torch.SymFloat)):
            made[node] = copy.meta["val"]
    return fx.GraphModule(gm, graph)


def at_the_upper_end(node: fx.Node) -> fx.Node:
    """A call as it is at the upper end: a node of a graph of its own, with numbers for inputs.

    For what looks at single calls, in graphs that Inductor has rewritten. A call on numbers alone stays as it is, and
    so does one whose sizes depend on data; a number that does is zero.
    """
    values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
    sizes = sizes_of(v for v in values)
    mode = next((getattr(v, "fake_mode") for v in values if hasattr(v, "fake_mode")), None)  # noqa: B009
    if mode is None or not any(is_symbolic(size) for size in sizes):
        return node
    if not all(known(size) for size in sizes_of(v for v in values if isinstance(v, torch.Tensor))):
        return node
    ends = {s: largest(_symint(size, s)) if known(size) else 0 for size in sizes for s in symbols_of(size)}
    graph = fx.Graph()

    def argument(source: fx.Node) -> Any:
        value = _at(source.meta.get("val"), ends, mode)
        if not isinstance(value, torch.Tensor):
            return value
        made = graph.placeholder(source.name)
        made.meta = {**source.meta, "val": value}
        return made

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), argument)
    alone = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    alone.meta = {**node.meta, "val": _at(node.meta.get("val"), ends, mode)}
    return alone


def _symint(size: Any, symbol: Any) -> Any:
    """A symbol of a size, as a size."""
    return size.node.shape_env.create_symintnode(symbol, hint=None)


def write_numbers(gm: fx.GraphModule) -> None:
    """Where every symbol has become a number, as a guard makes it, let values say so."""
    mode = _fake_mode(gm)
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            node.meta["val"] = _at(node.meta["val"], {}, mode)


def number_at(value: Any, values: Mapping[Any, int]) -> Any:
    """A symbolic number at given values of its symbols; anything else as it is."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    expr = value.node.expr.xreplace({s: values[s] for s in value.node.expr.free_symbols})
    if isinstance(value, torch.SymInt):
        return int(expr)
    return float(expr) if isinstance(value, torch.SymFloat) else bool(expr)


def _at(value: Any, values: Mapping[Any, int], mode: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if not any(isinstance(s, torch.SymInt) for s in sizes_of([value])):
            return value
        shape, stride = ([number_at(s, values) for s in sizes] for sizes in (value.shape, value.stride()))
        first = number_at(value.storage_offset(), values)
        with mode:
            if not first:
                return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
            last = first + sum((s - 1) * t for s, t in zip(shape, stride, strict=True))
            whole = torch.empty(max(first, last) + 1, dtype=value.dtype, device=value.device)
            return whole.as_strided(shape, stride, first)
    if isinstance(value, (tuple, list)):
        return type(value)(_at(v, values, mode) for v in value)
    return number_at(value, values)


def _fake_mode(gm: fx.GraphModule) -> Any:
    return next(v.fake_mode for n in gm.graph.nodes for v in [n.meta.get("val")] if hasattr(v, "fake_mode"))


def row_at(row: int, tokens: int, length: Any) -> Any:
    """Where the border before row `row` of `tokens` lies in a value with `length` rows."""
    if row in (0, tokens):
        return length if row == tokens else 0
    common = math.gcd(row, tokens)
    return length * (row // common) // (tokens // common)


def quotient(size: Any, by: Any) -> Any:
    """`size` divided by what it is a multiple of; a number where it is one.

    Raises:
        NoRange: it is no multiple at every length.
    """
    found = size // by
    if not is_symbolic(size):
        return found
    over = by.node.expr if isinstance(by, torch.SymInt) else by
    under = found.node.expr if isinstance(found, torch.SymInt) else found
    if (size.node.expr - under * over).expand() != 0:
        raise NoRange(f"{size} is no multiple of {by}")
    return found if is_symbolic(found) else int(found)


def as_argument(graph: fx.Graph, value: Any) -> Any:
    """What an FX node takes for a size: the size, where it is a number, else a node that computes it, inserted here."""
    if not isinstance(value, torch.SymInt):
        return value
    return _computed(graph, value.node.expr, value.node.shape_env)


_OPERATORS = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "Mod": operator.mod}
_OPERATORS |= {"PythonMod": operator.mod, "CleanDiv": operator.floordiv, "Min": torch.sym_min, "Max": torch.sym_max}


def _computed(graph: fx.Graph, expr: Any, environment: Any) -> Any:
    if expr.is_number:
        return int(expr)
    if expr.is_Symbol:
        return _input_of(graph, expr)
    if expr.is_Pow and expr.exp.is_number and expr.exp > 1:
        operands = [_computed(graph, expr.base, environment)] * int(expr.exp)
        function: Any = operator.mul
    else:
        function = _OPERATORS.get(type(expr).__name__)
        if function is None:
            raise NoRange(f"a size that is {type(expr).__name__}")
        operands = [_computed(graph, a, environment) for a in expr.args]
    result, *others = operands
    for other in others:
        value = function(_value(result), _value(other))
        result = graph.call_function(function, (result, other))
        result.meta["val"] = value
    return result


def _value(operand: Any) -> Any:
    return operand.meta["val"] if isinstance(operand, fx.Node) else operand


def _input_of(graph: fx.Graph, symbol: Any) -> fx.Node:
    """The input of a graph that is a symbol."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
    raise NoRange(f"the graph has no input that is {symbol}")
