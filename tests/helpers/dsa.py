"""Problems that the tests of placement share."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import strategies as st

from memo_compile.placement import Buffer, read_csv
from memo_compile.placement.core import Core, core_of

DATA = Path(os.environ.get("MEMO_DSA_DATA") or Path(__file__).parents[3] / "shared/data/dsa")


def buffers_of(rows):
    """Buffers of (size, start, life)."""
    return [Buffer(f"b{i}", size, start, start + life) for i, (size, start, life) in enumerate(rows)]


def problems(most=40, steps=30, size=40):
    """Lists of buffers, as a strategy."""
    row = st.tuples(st.integers(0, size), st.integers(0, steps), st.integers(1, 20))
    return st.lists(row, min_size=1, max_size=most).map(buffers_of)


def instance(name):
    """An instance of shared/data/dsa beside the checkout; skips the test where it is missing."""
    file = DATA / f"{name}.csv"
    if not file.exists():
        pytest.skip(f"shared/data/dsa/{name}.csv is not beside the checkout")
    return read_csv(file)


def core(buffers, alignment=1, fixed=None) -> Core:
    """The core of a problem without aliases."""
    return core_of(buffers, alignment, fixed or {})


def smallest_peak(buffers, fixed=None):
    """The optimum by trying every order: first fit reaches it in one of them. Few buffers only."""
    fixed = fixed or {}
    free = [b for b in buffers if b.name not in fixed]
    return min(
        _first_fit(order, [b for b in buffers if b.name in fixed], fixed) for order in itertools.permutations(free)
    )


def _first_fit(order, held, fixed):
    offsets = dict(fixed)
    placed = list(held)
    for b in order:
        offset = 0
        for o in sorted(placed, key=lambda o: offsets[o.name]):
            if o.start < b.end and b.start < o.end:
                if offset + b.size <= offsets[o.name]:
                    break
                offset = max(offset, offsets[o.name] + o.size)
        offsets[b.name] = offset
        placed.append(b)
    return max((offsets[b.name] + b.size for b in placed), default=0)
