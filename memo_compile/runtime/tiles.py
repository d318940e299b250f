"""A region of a graph, tile by tile: one call, whatever the number of tiles, of a body that is compiled once.

`memo_compile.passes.transforms.tiles` says which regions, `tile_bodies` what a tile is given. Bodies that were compiled
in this process are found by their keys; until one is, its graph runs op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from memo_compile.passes.transforms.tile_bodies import Program, bodies, programs

SCHEMAS = (
    "tiled_(Tensor(a!)[] results, Tensor[] operands, str program) -> ()",
    "addmm_onto_(Tensor(a!) dst, Tensor a, Tensor b) -> ()",
)


@cache
def compiled_bodies() -> dict[str, Callable[[list[torch.Tensor]], Any]]:
    """Bodies that Inductor has compiled, by their keys."""
    return {}


def tiled_(results: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], program: str) -> None:
    """Fill `results`: rows tile by tile, and sums over all tiles, in the order of the tokens."""
    p = programs()[program]
    targets = [_accumulator(r, dtype) for r, dtype in zip(results, p.accumulators, strict=True)]
    for lo, hi in p.tiles:
        _body_of(p, hi)(
            [
                *(part.of(value, lo, hi) for part, value in zip(p.operands, operands, strict=True)),
                *(part.of(value, lo, hi) for part, value in zip(p.results, targets, strict=True)),
            ]
        )
    for result, target in zip(results, targets, strict=True):
        if target is not result:
            result.copy_(target)


def _accumulator(result: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Where a result is written, or added up from zero."""
    if dtype is None:
        return result
    return result.zero_() if dtype == result.dtype else torch.zeros_like(result, dtype=dtype)


def _body_of(program: Program, hi: int) -> Callable[[list[torch.Tensor]], Any]:
    key = program.bodies[hi == program.tokens]
    compiled = compiled_bodies().get(key)
    return compiled if compiled is not None else lambda given: bodies()[key](*given)


def addmm_onto_(dst: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a matmul to `dst`, in place."""
    torch.addmm(dst, a, b, out=dst)
