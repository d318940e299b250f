"""For those who pad: batches padded to the next of a few lengths, the same that `options={"lengths": [...]}` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from memo_compile.errors import InvalidOption

FILL: Mapping[str, int] = {"labels": -100}  # what torch's cross entropy ignores; everything else is filled with 0


@dataclass(frozen=True)
class PadToLengths:
    """A collator: what `collate` makes of a batch, padded on the right to the next of `lengths`.

    Args:
        lengths: token counts, in any order.
        collate: makes a dict of tensors (batch, tokens, …) of a list of examples, as a tokenizer's collator does.
        fill: by key, what to fill with: the tokenizer's `pad_token_id` for "input_ids", say. -100 for "labels", else 0.
        dim: the dimension that counts tokens. What does not have the batch's length there is left as it is.

    Raises:
        InvalidOption: a batch that is longer than all lengths.
    """

    lengths: Sequence[int]
    collate: Callable[[list[Any]], Mapping[str, Any]] = torch.utils.data.default_collate
    fill: Mapping[str, int] = field(default_factory=dict)
    dim: int = 1

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = dict(self.collate(examples))
        tokens = max((v.shape[self.dim] for v in batch.values() if self._counts(v)), default=0)
        fitting = [length for length in sorted(self.lengths) if length >= tokens]
        if not fitting:
            raise InvalidOption("lengths", list(self.lengths), f"one of at least {tokens}, the length of this batch")
        return {key: self._padded(key, value, tokens, fitting[0]) for key, value in batch.items()}

    def _counts(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > self.dim

    def _padded(self, key: str, value: Any, tokens: int, length: int) -> Any:
        if not self._counts(value) or value.shape[self.dim] != tokens:
            return value
        padding = [0, 0] * (value.dim() - 1 - self.dim) + [0, length - tokens]
        return pad(value, padding, value=self.fill.get(key, FILL.get(key, 0)))
