"""torch's own split of the joint graph: what would run without a plan, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from memo_compile.passes.analysis.user_checkpoints import Policies, drop_suggestions
from memo_compile.passes.transforms.partition import Split, saved_in, split_as_torch


@dataclass(frozen=True)
class Unplanned:
    """torch's split; and the nodes of the joint graph that it would save without suggestions of a user's checkpoints.

    `saved` is None where the joint graph lacks one of them.
    """

    split: Split
    saved: list[fx.Node] | None


def unplanned(
    joint: fx.GraphModule, inputs: Any, num_forward_outputs: int, static_inputs: list[int] | None, policies: Policies
) -> Unplanned:
    """Split as torch would. The joint graph loses dead nodes, duplicates, and what checkpoints only suggest."""
    split = start = split_as_torch(joint, inputs, num_forward_outputs, static_inputs)
    if policies.suggested:  # the user's checkpoints say what may be recomputed; memo asks what would be saved without
        drop_suggestions(joint, policies)
        start = split_as_torch(joint, inputs, num_forward_outputs, static_inputs)
    return Unplanned(split, saved_in(joint, start))
