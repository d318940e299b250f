"""Is a size largest where the lengths that it is made of are? One that is not cannot be planned at the upper end.

What is a sum or a product of sizes that grow does grow. Anything else, as the rows between two borders are, is computed
at the corners of the range, and for each length in turn along its edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

EDGE = 4096  # lengths along an edge, at most: all of them in a shorter range
CORNERS = 64

# In the words of torch's symbolic functions.
_FUNCTIONS: Mapping[str, Any] = {
    "__builtins__": {},
    "Mod": np.mod,
    "PythonMod": np.mod,
    "FloorDiv": np.floor_divide,
    "CleanDiv": np.floor_divide,
    "Max": lambda *values: np.maximum.reduce(np.broadcast_arrays(*values)),
    "Min": lambda *values: np.minimum.reduce(np.broadcast_arrays(*values)),
}


def is_largest_at_the_end(size: Any, box: Mapping[Any, tuple[int, int]]) -> bool:
    """Whether no value of a sympy expression within the box, {symbol: (lowest, highest)}, is above that at its end."""
    if _grows(size):
        return True
    symbols = sorted(size.free_symbols, key=str)
    if not set(symbols) <= box.keys():
        return False
    try:
        end = int(_values(size, {s: np.array([box[s][1]]) for s in symbols})[0])
        return all(int(_values(size, points).max()) <= end for points in _edges({s: box[s] for s in symbols}))
    except (NameError, TypeError, SyntaxError, AttributeError):
        return False  # a function that nobody knows here


def _grows(size: Any) -> bool:
    if size.is_number:
        return bool(size >= 0)
    if size.is_Symbol:
        return True
    if type(size).__name__ in ("FloorDiv", "CleanDiv"):
        over, by = size.args
        return _grows(over) and bool(by.is_number and by > 0)
    if size.is_Pow:
        return _grows(size.base) and bool(size.exp.is_Integer and size.exp > 0)
    return (size.is_Add or size.is_Mul or type(size).__name__ in ("Max", "Min")) and all(map(_grows, size.args))


def _edges(box: Mapping[Any, tuple[int, int]]) -> list[dict[Any, Any]]:
    """Points along each edge of the box, as arrays."""
    return [points for symbol in box for points in _edges_along(symbol, box)]


def _edges_along(symbol: Any, box: Mapping[Any, tuple[int, int]]) -> Iterator[dict[Any, Any]]:
    low, high = box[symbol]
    spread = np.linspace(low, high, min(EDGE, high - low + 1)).round().astype(np.int64)
    along = np.unique(np.concatenate([spread, np.arange(max(low, high - 64), high + 1)]))
    others = [s for s in box if s is not symbol]
    for corner in itertools.islice(itertools.product(*(box[s] for s in others)), CORNERS):
        yield {symbol: along, **{s: np.full_like(along, n) for s, n in zip(others, corner, strict=True)}}


def _values(size: Any, points: Mapping[Any, Any]) -> Any:
    first = next(iter(points.values()))
    found = eval(str(size), {**_FUNCTIONS}, {str(symbol): values for symbol, values in points.items()})
    return np.broadcast_to(np.asarray(found), first.shape)
