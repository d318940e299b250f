"""The stream engine, on simulated streams: what it asks of CUDA."""

import pytest
import torch
from runtime.simulated import Cuda

from memo_compile.runtime.pieces import MOST_PIECES, pieces
from memo_compile.runtime.streams import StreamEngine


@pytest.fixture
def cuda():
    made = Cuda()
    yield made
    made.close()


def test_token_rows_of_heads_are_copied_head_by_head_and_dense(cuda, monkeypatch):
    """A strided copy would go through a temporary on the device."""
    copied = []
    copy = cuda.copy
    monkeypatch.setattr(cuda, "copy", lambda dst, src, stream: (copied.append((dst, src)), copy(dst, src, stream)))
    engine = StreamEngine(torch.device("cpu"), cuda=cuda)
    src, lease = torch.randn(2, 4, 16, 8), torch.zeros(4096, dtype=torch.uint8)
    dst = torch.zeros_like(src)
    engine.offload(src[:, :, :6], lease, 0)
    engine.offload_wait(src[:, :, :6], lease, 0)
    engine.prefetch(dst[:, :, :6], lease, 0)
    engine.prefetch_wait(dst[:, :, :6], lease, 0)
    cuda.compute.synchronize()
    assert torch.equal(dst[:, :, :6], src[:, :, :6])
    assert dst[:, :, 6:].abs().sum() == 0
    assert len(copied) == 2 * 8
    assert all(a.is_contiguous() and b.is_contiguous() for a, b in copied)
    assert engine.recorder.stats.copies_out == engine.recorder.stats.copies_in == 1


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (torch.zeros(8, 4), 1),
        (torch.zeros(1, 8, 4)[:, :3], 1),
        (torch.zeros(8, 4)[:, :2], 8),
        (torch.zeros(3, 8, 4).permute(1, 0, 2), 24),
        (torch.zeros(8, 4)[:, ::2], 1),
        (torch.zeros(2 * MOST_PIECES, 4)[:, :2], 1),
        (torch.zeros(0, 4), 1),
        (torch.tensor(1.0), 1),
    ],
    ids=["dense", "one of one", "rows", "permuted", "single rows strided", "too many", "empty", "scalar"],
)
def test_pieces_are_dense_and_are_the_whole(value, count):
    source = torch.arange(float(value.numel())).view(value.shape)
    found = pieces(value, source)
    assert len(found) == count
    for to, origin in found:
        to.copy_(origin)
    assert torch.equal(value, source)
