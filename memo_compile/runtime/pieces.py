"""One strided copy as copies that need no temporary: in two dimensions where it can be, else between dense parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

Ints = tuple[int, ...]

MOST_PIECES = 1024  # of one slice: each costs the host some microseconds
WIDE = 4096  # bytes: rows of so much are worth their place in a copy in two dimensions, however many there are
MOST_PITCH = 2**31 - 1  # bytes: cudaDevAttrMaxPitch, the same for all devices since compute capability 2


class Plane(NamedTuple):
    """`height` rows of `width` bytes, from the addresses of the first on; the pitches are bytes from row to row."""

    dst: int
    src: int
    width: int
    height: int
    dst_pitch: int
    src_pitch: int


@dataclass(frozen=True)
class _Axis:
    size: int
    dst: int  # bytes from one part to the next
    src: int


def planes(dst: torch.Tensor, src: torch.Tensor) -> list[Plane]:
    """One copy as copies in two dimensions, such as the token rows of all heads; a dense one is a single row.

    Empty where a row is strided itself or rows overlap: then see `pieces`.

    >>> [(p.height, p.width) for p in planes(torch.zeros(2, 3, 4), torch.zeros(2, 8, 4)[:, :3])]
    [(2, 48)]
    """
    relative = _planes(tuple(dst.shape), dst.stride(), src.stride(), dst.element_size())
    return _at(relative, dst.data_ptr(), src.data_ptr())


def planes_to_host(src: torch.Tensor, address: int) -> list[Plane]:
    """`planes` to host memory, where a value lies dense from an address on."""
    relative = _planes_to_dense(src.shape, src.stride(), src.element_size())
    return _at(relative, address, src.data_ptr())


def planes_from_host(dst: torch.Tensor, address: int) -> list[Plane]:
    """`planes` the other way."""
    relative = _planes_from_dense(dst.shape, dst.stride(), dst.element_size())
    return _at(relative, dst.data_ptr(), address)


@lru_cache(maxsize=4096)  # a step asks the same of each of its slices, and the host is in a hurry
def _planes_to_dense(shape: Ints, stride: Ints, element: int) -> tuple[Plane, ...]:
    return _planes(tuple(shape), _dense_strides(shape), stride, element)


@lru_cache(maxsize=4096)
def _planes_from_dense(shape: Ints, stride: Ints, element: int) -> tuple[Plane, ...]:
    return _planes(tuple(shape), stride, _dense_strides(shape), element)


def _dense_strides(shape: Ints) -> Ints:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _at(relative: Sequence[Plane], dst: int, src: int) -> list[Plane]:
    return [Plane(dst + p[0], src + p[1], p[2], p[3], p[4], p[5]) for p in relative]


@lru_cache(maxsize=4096)
def _planes(shape: Ints, dst: Ints, src: Ints, element: int) -> tuple[Plane, ...]:
    """`planes` of values at address 0, by their shape and strides (elements) and the bytes of an element."""
    outer = _outer_dims(shape, dst, src)
    width = math.prod(shape[outer:]) * element
    if outer == 0:
        return (Plane(0, 0, width, 1, width, width),) if width else ()
    axes = _joined([_Axis(n, d * element, s * element) for n, d, s in zip(shape, dst, src, strict=True)][:outer])
    rows = max((a for a in axes if _is_pitch(a, width)), key=lambda a: a.size, default=None)
    if rows is None or outer == len(shape) or not _worth_it(axes, rows, width):
        return ()
    others = [a for a in axes if a is not rows]
    return tuple(
        Plane(
            sum(i * a.dst for i, a in zip(at, others, strict=True)),
            sum(i * a.src for i, a in zip(at, others, strict=True)),
            *(width, rows.size, rows.dst, rows.src),
        )
        for at in itertools.product(*(range(a.size) for a in others))
    )


def pieces(dst: torch.Tensor, src: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One copy as copies between dense parts, such as the token rows of each head.

    torch copies between host and device through a temporary of the whole on the device where one side is strided:
    bytes that nobody has counted, and one more pass over them. Dense parts go straight from where they lie. Where
    there would be too many parts, or a single row is strided, the temporary is the lesser evil.

    >>> whole = torch.zeros(2, 8, 4)
    >>> [tuple(to.shape) for to, _ in pieces(torch.zeros(2, 3, 4), whole[:, :3])]
    [(3, 4), (3, 4)]
    """
    outer = _outer_dims(tuple(dst.shape), dst.stride(), src.stride())
    if outer == 0 or outer == dst.dim() or math.prod(dst.shape[:outer]) > MOST_PIECES:
        return [(dst, src)]
    return [(dst[at], src[at]) for at in itertools.product(*(range(size) for size in dst.shape[:outer]))]


@lru_cache(maxsize=4096)
def _outer_dims(shape: Ints, dst: Ints, src: Ints) -> int:
    """The least number of first dimensions after which both sides are dense."""
    return max(_strided_dims(shape, side) for side in (dst, src)) if math.prod(shape) else 0


def _strided_dims(shape: Ints, stride: Ints) -> int:
    step = 1
    for dim in reversed(range(len(shape))):
        if shape[dim] != 1 and stride[dim] != step:
            return dim + 1
        step *= shape[dim]
    return 0


def _joined(axes: Sequence[_Axis]) -> list[_Axis]:
    """With neighbours that one step can walk, on both sides, as one."""
    found: list[_Axis] = []
    for axis in (a for a in axes if a.size != 1):
        before = found[-1] if found else None
        if before is not None and (before.dst, before.src) == (axis.size * axis.dst, axis.size * axis.src):
            found[-1] = _Axis(before.size * axis.size, axis.dst, axis.src)
        else:
            found.append(axis)
    return found


def _is_pitch(axis: _Axis, width: int) -> bool:
    return all(width <= pitch <= MOST_PITCH for pitch in (axis.dst, axis.src))


def _worth_it(axes: Sequence[_Axis], rows: _Axis, width: int) -> bool:
    count = math.prod(a.size for a in axes)
    return count // rows.size <= MOST_PIECES and (count <= MOST_PIECES or width >= WIDE)
