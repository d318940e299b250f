"""What share of a device's peak kernels reach: by their FLOPs, and by their FLOPs within a class of shapes.

A matmul of few rows and one that is square may have as many FLOPs and not the same share, and so may attention over
few heads and long sequences. So a profile may hold tables by class: for matmuls by their smallest dimension, for
attention by batch times heads, where the FLOPs then tell the length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from memo_compile.errors import shown

Efficiency = tuple[tuple[float, float], ...]
Classes = tuple[tuple[float, Efficiency], ...]


def share_at(table: Sequence[Sequence[float]], size: float) -> float:
    """The share at a size: straight between entries over the logarithm of the size, and level beyond the ends.

    >>> share_at([(1e9, 0.2), (1e11, 0.6)], 1e10)
    0.4
    >>> share_at([(1e9, 0.2), (1e11, 0.6)], 1e15)
    0.6
    """
    return _between([(entry[0], entry[1]) for entry in table], size, lambda share: share)


def share_in(classes: Classes, key: float, size: float) -> float:
    """The share of a size in a class: straight between the classes around it, as between sizes.

    >>> few, many = ((1e9, 0.1),), ((1e9, 0.5),)
    >>> share_in(((16, few), (256, many)), 64, 1e9)
    0.3
    """
    return _between(classes, key, lambda table: share_at(table, size))


def _between(entries: Sequence[tuple[float, Any]], at: float, value: Callable[[Any], float]) -> float:
    if at <= entries[0][0]:
        return value(entries[0][1])
    for (low, a), (high, b) in pairwise(entries):
        if at <= high:
            return value(a) + (value(b) - value(a)) * math.log(at / low) / math.log(high / low)
    return value(entries[-1][1])


def read_table(name: str, raw: Iterable[tuple[Any, Any]]) -> Efficiency:
    """A table from what JSON holds of it.

    Raises:
        ValueError: it is none; `share_at` takes logarithms of sizes, and of how far two are apart.
    """
    allowed = f"{name} must be a list of (FLOPs, share), both finite and above 0, the FLOPs rising"
    try:
        table = tuple((float(size), float(share)) for size, share in raw)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{allowed} ({error})") from error
    if not table or not _rising(table) or not all(is_above_zero(number) for entry in table for number in entry):
        raise ValueError(f"{allowed}, not {shown(table)}")
    return table


def read_classes(name: str, raw: Iterable[tuple[Any, Any]]) -> Classes:
    """Classes from what JSON holds of them; none is allowed.

    Raises:
        ValueError: they are not (size, table), the sizes finite, above 0 and rising.
    """
    allowed = f"{name} must be a list of (size, table), the sizes finite, above 0 and rising"
    try:
        classes = tuple((float(size), read_table(f"each table in {name}", table)) for size, table in raw)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{allowed} ({error})") from error
    if not _rising(classes) or not all(is_above_zero(size) for size, _ in classes):
        raise ValueError(f"{allowed}, not {shown(classes)}")
    return classes


def _rising(entries: Sequence[tuple[float, Any]]) -> bool:
    return all(low[0] < high[0] for low, high in pairwise(entries))


def is_above_zero(value: object) -> bool:
    """Whether it is a number above 0 that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
