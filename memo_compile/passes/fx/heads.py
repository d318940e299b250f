"""Into how many calls a fused attention over many heads is cut."""

from __future__ import annotations

import torch


def heads_of_piece(batch: int, heads: int, pieces: int) -> int:
    """Heads that one call of the kernel is given: so many that each of its threads has one."""
    return min(heads, max(-(-heads // pieces), -(-torch.get_num_threads() // batch)))
