"""What is saved between forward and backward before any decision: torch's choice, brought to canonical values."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from memo_compile.errors import DrawnTwice
from memo_compile.passes.analysis.user_checkpoints import Policies
from memo_compile.passes.transforms.partition import Split, canonical_saved, split_saving
from memo_compile.passes.transforms.unplanned import Unplanned


@dataclass(frozen=True)
class SavedSet:
    """The canonical saved values, and the split that saves them; without values, torch's own: only that is right."""

    values: list[fx.Node]
    split: Split
    plannable: bool


def saved_set(joint: fx.GraphModule, unplanned: Unplanned, policies: Policies) -> SavedSet:
    """torch's saved values as memo saves them, and the split that does so."""
    as_torch = SavedSet([], unplanned.split, plannable=False)
    if unplanned.saved is None:
        return as_torch
    values = canonical_saved(joint, unplanned.saved, policies)
    try:
        return SavedSet(values, split_saving(joint, values, unplanned.split.num_forward_outputs), plannable=True)
    except DrawnTwice:  # in the user's own checkpoints, where torch's split keeps the generator's states
        return as_torch
