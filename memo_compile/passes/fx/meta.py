"""The keys under which passes leave what they found in `node.meta`, for other passes and for reports."""

from __future__ import annotations

from enum import Enum

TOKENS = "memo_tokens"  # TokenInfo: the token axis of the value
LAYER = "memo_layer"  # LayerInfo: the repeated layer that the node stands in
WHY = "memo_why"  # why a pass inserted the node, in words
FOR = "memo_for"  # the name of the saved activation that the node serves
PART_OF = "memo_part_of"  # the name of the saved activation of which the value is the kept rows
UNCHECKED = "saved_tensor_with_no_vc_check"  # torch's mark of what an autograd function keeps by itself
ROLE = "memo_role"  # Role: what a node that a pass inserted makes


class Role(Enum):
    """What a node of the backward, inserted by a pass, has to do with a saved activation."""

    PREFETCH_BUFFER = "the place where rows land that come back from the host"
    PREFETCHED = "rows that come back from the host, and the whole that they are part of"
    RECOMPUTED = "rows that are recomputed"
    KEPT = "rows that stayed on the device"
