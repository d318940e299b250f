"""What the unplanned graphs hold, by the model that plans are made from."""

import pytest
import torch

from memo_compile.trace.offline import trace

ROWS, WIDTH = 256, 64
SCORES = ROWS * WIDTH * 4  # bytes


class Scores(torch.nn.Module):
    """A loss of scores, as a language model has it: the backward reads a view of what may be returned, too."""

    def __init__(self, shown):
        super().__init__()
        self.linear, self.shown = torch.nn.Linear(WIDTH, WIDTH, bias=False), shown

    def forward(self, x, labels):
        scores = self.linear(x)
        loss = torch.nn.functional.cross_entropy(scores.view(-1, WIDTH), labels)
        return (loss, scores) if self.shown else loss


def unplanned_peak(shown):
    batch = torch.randn(1, ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int64)
    p, _ = trace(Scores(shown), batch, {}, {"hardware": "h100", "memory_budget": 0.5})
    return p.unplanned_peak


def test_a_saved_view_of_a_result_is_counted_once():
    """What is returned costs the gradient that autograd hands to the backward for it, and no more."""
    assert unplanned_peak(shown=True) == pytest.approx(unplanned_peak(shown=False) + SCORES, abs=SCORES / 4)
