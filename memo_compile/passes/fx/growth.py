"""Is a size largest where the lengths that it is made of are? One that is not cannot be planned at the upper end.

What is a sum or a product of sizes that grow does grow. Anything else, as the rows between two borders are, is computed
for all lengths that there are; where those are too many, it counts as not so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MOST = 2**22  # lengths, or combinations of several symbols: half a second for one size, on one core

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
    lengths = [range(box[s][0], box[s][1] + 1) for s in symbols]
    if math.prod(map(len, lengths)) > MOST:
        return False
    grid = dict(zip(symbols, np.meshgrid(*lengths, indexing="ij", sparse=True), strict=True))
    try:
        found = _values(size, grid)
        return bool(found.max() <= found[(-1,) * len(symbols)])
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


def _values(size: Any, grid: Mapping[Any, Any]) -> Any:
    """The size for all combinations of its symbols' values, which have an axis each."""
    found = eval(str(size), {**_FUNCTIONS}, {str(symbol): values for symbol, values in grid.items()})
    return np.broadcast_to(np.asarray(found), np.broadcast_shapes(*(values.shape for values in grid.values())))
