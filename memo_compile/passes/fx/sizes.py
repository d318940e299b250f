"""Sizes that are symbols: what they are in the call at hand, and at the upper end of what they may be.

Neither adds a guard. Private torch APIs, tried with torch 2.13: `SymNode.expr` and `SymNode.shape_env`, and of the
latter `var_to_range` and the values that symbols were seen with (`backed_var_to_val`, or `var_to_val` before it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

UNBOUNDED = 2**40  # an upper end beyond this is none: no tensor has such a dimension


def is_symbolic(size: Any) -> bool:
    """Whether a size is not a number, but a symbol or made of symbols."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def sizes_of(values: Iterable[Any]) -> list[Any]:
    """Sizes and strides of tensors, and numbers that are given by themselves."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.extend((*value.shape, *value.stride()))
        elif isinstance(value, (int, torch.SymInt)):
            found.append(value)
    return found


def symbols_of(size: Any) -> frozenset[Any]:
    """The symbols that a size is made of."""
    return frozenset(size.node.expr.free_symbols) if is_symbolic(size) else frozenset()


def known(size: Any) -> bool:
    """Whether every symbol in a size had a value in the call at hand; not so where sizes depend on data."""
    return not is_symbolic(size) or symbols_of(size) <= _seen_with(size).keys()


def seen(size: Any) -> int:
    """A size in the call at hand."""
    return _at(size, _seen_with(size)) if is_symbolic(size) else int(size)


def largest(size: Any) -> int:
    """A size at the upper ends of the ranges of its symbols; as it was seen where a symbol's range has none."""
    if not is_symbolic(size):
        return int(size)
    ranges, values = size.node.shape_env.var_to_range, _seen_with(size)
    return _at(size, {s: upper_end(ranges.get(s), values.get(s)) for s in symbols_of(size)})


def upper_end(range_of: Any, otherwise: Any) -> Any:
    """The upper end of a symbol's range, something else where that has none."""
    if range_of is None or not range_of.upper.is_number or range_of.upper > UNBOUNDED:
        return otherwise
    return range_of.upper


def bounded(symbol: Any, size: torch.SymInt) -> bool:
    """Whether the range of a symbol in `size` has an upper end."""
    return upper_end(size.node.shape_env.var_to_range.get(symbol), None) is not None


def _seen_with(size: Any) -> Mapping[Any, Any]:
    environment = size.node.shape_env
    name = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"
    values: Mapping[Any, Any] = getattr(environment, name)
    return values


def _at(size: Any, values: Mapping[Any, Any]) -> int:
    return int(size.node.expr.xreplace({s: values[s] for s in symbols_of(size)}))


def elements(shape: Sequence[Any]) -> int:
    """Elements of a shape at the upper end."""
    count = 1
    for size in shape:
        count *= largest(size)
    return count
