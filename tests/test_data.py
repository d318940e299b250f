"""Batches padded to a few lengths."""

import pytest
import torch

from memo_compile.data import PadToLengths
from memo_compile.errors import InvalidOption


def examples(n, count=2):
    return [
        {"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1), "weight": torch.tensor(0.5)}
        for _ in range(count)
    ]


def test_a_batch_is_padded_to_the_next_length():
    collate = PadToLengths([64, 16, 32], fill={"input_ids": 7})
    for n, length in ((9, 16), (16, 16), (17, 32), (64, 64)):
        batch = collate(examples(n))
        assert batch["input_ids"].shape == batch["labels"].shape == (2, length)
        assert torch.equal(batch["input_ids"][:, :n], torch.arange(1, n + 1).expand(2, n))
        assert (batch["input_ids"][:, n:] == 7).all()
        assert (batch["labels"][:, n:] == -100).all()
        assert torch.equal(batch["weight"], torch.tensor([0.5, 0.5]))


def test_tokens_may_have_features_after_them():
    collate = PadToLengths([8], collate=lambda rows: {"x": torch.stack(rows)})
    batch = collate([torch.ones(5, 3)] * 2)
    assert batch["x"].shape == (2, 8, 3)
    assert batch["x"][:, 5:].abs().sum() == 0


def test_a_batch_beyond_all_lengths_is_refused():
    with pytest.raises(InvalidOption, match=r"\[8, 16\].*at least 17"):
        PadToLengths([8, 16])(examples(17))
