"""Emitted text of a graph for a range of lengths, with numbers for its symbols: those at the upper end.

Offsets are constant, and no buffer is larger below: what does not overlap at the upper end overlaps nowhere.

Private torch API, tried with torch 2.13: `V.graph.name_to_buffer`, `V.graph.sizevars`, its `shape_env` (with `replace`)
and `inv_precomputed_replacements`; `ir.MutationLayoutSHOULDREMOVE`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memo_compile.passes.fx.growth import is_largest_at_the_end
from memo_compile.passes.fx.ranges import NoRange
from memo_compile.passes.fx.sizes import upper_end

_FOLDED: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLED: Mapping[str, Callable[..., int]] = {"max": max, "min": min}


def symbols_at_hand() -> dict[str, int]:
    """The symbols of the graph that Inductor has at hand, by name, each at the upper end of its range."""
    from torch._inductor.virtualized import V  # loads Inductor

    sizes = V.graph.sizevars
    environment: Any = sizes.shape_env
    seen = getattr(environment, "backed_var_to_val", None) or environment.__dict__.get("var_to_val", {})
    found = {s: upper_end(environment.var_to_range.get(s), seen.get(s)) for s in seen}
    known = {s: end for s, end in found.items() if end is not None}
    # What a guard has made equal to others keeps the range that it had.
    ends = {s: environment.replace(s).xreplace(known) for s in known}
    values = {str(s): int(end) for s, end in ends.items()}
    for symbol, expr in sizes.inv_precomputed_replacements.items():
        values[str(symbol)] = int(expr.xreplace(ends))
    return values


def check_growing() -> None:
    """Each buffer of the graph that Inductor has at hand must be largest at the upper end: so much room it has.

    Raises:
        NoRange: one may be larger where a length is smaller.
    """
    from torch._inductor import ir  # loads Inductor
    from torch._inductor.virtualized import V

    sizes = V.graph.sizevars
    checked: set[Any] = set()
    for buffer in V.graph.name_to_buffer.values():
        layout = getattr(buffer, "layout", None)
        shape, stride = getattr(layout, "size", None), getattr(layout, "stride", None)
        if shape is None or stride is None or getattr(buffer, "name", None) is None:
            continue  # what stands for a block within a template has no name, and no memory
        if isinstance(layout, ir.MutationLayoutSHOULDREMOVE):
            continue  # a write to another's memory
        span = 1 + sum((s - 1) * t for s, t in zip(shape, stride, strict=True))
        if not getattr(span, "free_symbols", ()):
            continue
        span = sizes.shape_env.replace(span.xreplace(sizes.inv_precomputed_replacements))
        if span in checked:
            continue
        checked.add(span)
        ranges = {s: sizes.shape_env.var_to_range.get(s) for s in span.free_symbols}
        box = {s: (int(r.lower), int(r.upper)) for s, r in ranges.items() if upper_end(r, None) is not None}
        if not is_largest_at_the_end(span, box):
            raise NoRange(f"{buffer.get_name()}, which spans {span}, may be larger where a length is smaller")


def number_of(expr: Any) -> int:
    """A size of Inductor's at the upper end."""
    symbols = getattr(expr, "free_symbols", ())
    if not symbols:
        return int(expr)
    values = symbols_at_hand()
    return int(expr.xreplace({s: values[str(s)] for s in symbols}))


def numbered(lines: Sequence[str], values: Mapping[str, int]) -> list[str]:
    """The lines with values in the place of names, and arithmetic on them done.

    >>> numbered(["    buf0 = empty_strided_cpu((2*s0, s0 // 3), (s0 // 3, 1), torch.float32)"], {"s0": 6})
    ['    buf0 = empty_strided_cpu((12, 2), (2, 1), torch.float32)']
    """
    if not values:
        return list(lines)
    named = re.compile(r"\b(" + "|".join(map(re.escape, values)) + r")\b")
    return ["\n".join(_numbered(part, values, named) for part in line.split("\n")) for line in lines]


def _numbered(line: str, values: Mapping[str, int], named: re.Pattern[str]) -> str:
    text = line.lstrip()
    if text.startswith("#") or not named.search(line):
        return line
    try:
        tree = ast.parse(text)
    except SyntaxError:  # the head of a block
        return line
    statements = _Numbers(values).visit(tree).body
    return line[: len(line) - len(text)] + "; ".join(map(ast.unparse, statements))


class _Numbers(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, int]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = node.id in self.values and isinstance(node.ctx, ast.Load)
        return ast.Constant(self.values[node.id]) if known else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        fold = _FOLDED.get(type(node.op))
        if fold is None or not all(_is_number(side) for side in (node.left, node.right)):
            return node
        return ast.Constant(fold(ast.literal_eval(node.left), ast.literal_eval(node.right)))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        fold = _CALLED.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if fold is None or not all(map(_is_number, node.args)):
            return node
        return ast.Constant(fold(*map(ast.literal_eval, node.args)))


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _is_number(node.operand)
    return isinstance(node, ast.Constant) and isinstance(node.value, int)
