"""Into how many calls a fused attention over many heads is cut."""

from __future__ import annotations

import torch


def heads_of_piece(batch: int, heads: int, pieces: int) -> int:
    """Heads that one call of the kernel is given: so many that each of its threads has one."""
    return min(heads, max(-(-heads // pieces), -(-torch.get_num_threads() // batch)))


def adds_up(dtype: torch.dtype) -> bool:
    """Whether gradients of keys may be added up call by call: the kernel does it in float32, or better."""
    return dtype in (torch.float32, torch.float64)


def head_slices(
    batch: int, heads: int, shared: int, pieces: int, *, parts: bool = True
) -> list[list[tuple[slice, slice]]]:
    """What each call is given of the `heads` of queries and of the `shared` ones of keys and values, of which each
    serves as many queries: a list for each share of the latter, of all calls that it takes part in.

    Args:
        parts: whether one call may be given fewer queries than a head of keys serves.

    >>> head_slices(1, 4, 2, 4)[0]
    [(slice(0, 1, None), slice(0, 1, None)), (slice(1, 2, None), slice(0, 1, None))]
    """
    step, group = heads_of_piece(batch, heads, pieces), heads // shared
    if step >= group or not parts:
        keys = max(1, step // group)
        return [
            [(slice(group * first, group * min(first + keys, shared)), slice(first, min(first + keys, shared)))]
            for first in range(0, shared, keys)
        ]
    return [
        [
            (slice(first, min(first + step, group * (key + 1))), slice(key, key + 1))
            for first in range(group * key, group * (key + 1), step)
        ]
        for key in range(shared)
    ]
