"""How Inductor lowers memo's ops that are no extern kernels.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `torch._inductor.lowering.register_lowering` and `clone`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def register_lowerings() -> None:
    """Lower `memo::keep` as a copy, which fuses and lies in the arena.

    `aten.clone` would not do: Inductor drops it where the copy would have the strides of the view that it copies
    (`remove_noop_ops`), and the rows that stay then hold the whole value.
    """
    from torch._inductor import lowering

    module: Any = lowering
    module.register_lowering(torch.ops.memo.keep.default, type_promotion_kind=None)(lambda src: module.clone(src))
