"""The stream engine, on simulated streams: what it asks of CUDA."""

import pytest
import torch
from runtime.simulated import Cuda, copy_rows

from memo_compile.runtime.engine import Engine
from memo_compile.runtime.pieces import MOST_PIECES, MOST_PITCH, WIDE, pieces, planes
from memo_compile.runtime.streams import StreamEngine

CPU = torch.device("cpu")


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


def moved_there_and_back(cuda):
    """Token rows of heads, and what came back of them."""
    engine = StreamEngine(CPU, cuda=cuda)
    src, lease = torch.randn(2, 4, 16, 8), torch.zeros(4096, dtype=torch.uint8)
    dst = torch.zeros_like(src)
    engine.offload(src[:, :, :6], lease, 0)
    engine.offload_wait(src[:, :, :6], lease, 0)
    engine.prefetch(dst[:, :, :6], lease, 0)
    engine.prefetch_wait(dst[:, :, :6], lease, 0)
    cuda.compute.synchronize()
    assert dst[:, :, 6:].abs().sum() == 0
    assert torch.equal(lease[: 2 * 4 * 6 * 8 * 4].view(torch.float32).view(2, 4, 6, 8), src[:, :, :6])
    return src[:, :, :6], dst[:, :, :6]


def test_the_stream_is_set_once_a_copy(cuda, monkeypatch):
    set_to = []
    on = cuda.on
    monkeypatch.setattr(cuda, "on", lambda stream: set_to.append(stream) or on(stream))
    assert torch.equal(*moved_there_and_back(cuda))
    assert len(set_to) == 2


def test_token_rows_of_all_heads_are_one_copy_in_two_dimensions(monkeypatch):
    cuda = Cuda(two_dimensions=True)
    copied = []
    copy_planes = cuda.copy_planes
    monkeypatch.setattr(cuda, "copy_planes", lambda *args: copied.append(args) or copy_planes(*args))
    monkeypatch.setattr(cuda, "copy", lambda *args: pytest.fail("a piece was copied"))
    assert torch.equal(*moved_there_and_back(cuda))
    assert [(kind, len(flat), flat[0].height, flat[0].width) for flat, kind, _ in copied] == [
        ("D2H", 1, 8, 6 * 8 * 4),
        ("H2D", 1, 8, 6 * 8 * 4),
    ]
    cuda.close()


def test_what_is_dense_is_one_copy_by_its_address(monkeypatch):
    cuda = Cuda(two_dimensions=True)
    monkeypatch.setattr(cuda, "copy", lambda *args: pytest.fail("torch copied"))
    engine, lease = StreamEngine(CPU, cuda=cuda), torch.zeros(4096, dtype=torch.uint8)
    src, dst = torch.randn(3, 5), torch.zeros(3, 5)
    engine.offload(src, lease, 64)
    engine.offload_wait(src, lease, 64)
    engine.prefetch(dst, lease, 64)
    engine.prefetch_wait(dst, lease, 64)
    cuda.compute.synchronize()
    assert torch.equal(dst, src)
    assert lease.count_nonzero() == lease[64 : 64 + src.nbytes].count_nonzero()
    cuda.close()


@pytest.mark.parametrize("way", ["offload", "prefetch"])
def test_nothing_is_copied_beyond_a_lease(way):
    cuda = Cuda(two_dimensions=True)
    engine = StreamEngine(CPU, cuda=cuda)
    with pytest.raises(RuntimeError):
        getattr(engine, way)(torch.zeros(16), torch.zeros(64, dtype=torch.uint8), 4)
    assert engine.pending == 0
    cuda.close()


def strided(shape, order):
    """A value of this shape whose dimensions lie in memory in this order."""
    return torch.zeros([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


@pytest.mark.parametrize(
    ("value", "count", "height"),
    [
        (torch.zeros(8, 4), 1, 1),
        (torch.zeros(8, 4)[:, :2], 1, 8),
        (torch.zeros(2, 5, 8, 4)[:, :, :3], 1, 10),
        (torch.zeros(2, 5, 8, 4)[:, :4, :3], 2, 4),
        (strided((8, 3, 4), (1, 0, 2)), 3, 8),
        (torch.zeros(8, 4)[:, ::2], 0, 0),
        (torch.zeros(1, 4).expand(8, 4), 0, 0),
        (torch.zeros(2 * MOST_PIECES, 4)[:, :2], 0, 0),
        (torch.zeros(2 * MOST_PIECES, WIDE // 2)[:, : WIDE // 4], 1, 2 * MOST_PIECES),
        (torch.zeros(0, 4)[:, :2], 0, 0),
        (torch.tensor(1.0), 1, 1),
    ],
    ids=["dense", "rows", "heads", "some heads", "permuted", "elements", "overlap", "many", "wide", "empty", "scalar"],
)
def test_planes_are_the_whole(value, count, height):
    source = torch.arange(float(value.numel())).view(value.shape)
    found = planes(value, source)
    assert (len(found), found[0].height if found else 0) == (count, height)
    for plane in found:
        copy_rows(plane)
    assert not found or torch.equal(value, source)


@pytest.mark.parametrize(("pitch", "count"), [(MOST_PITCH, 1), (MOST_PITCH + 1, 0)])
def test_rows_further_apart_than_the_runtime_can_walk_are_no_plane(pitch, count):
    far = torch.empty_strided((2, 4), (pitch, 1), dtype=torch.uint8, device="meta")
    assert len(planes(far, torch.empty(2, 4, dtype=torch.uint8, device="meta"))) == count


class Allocator:
    """CUDA's caching allocator, as far as it can be asked; an allocation that fails makes it try again."""

    def __init__(self, cuda, monkeypatch, free=0, kept=0, largest=0):
        self.free, self.unused, self.largest = free, kept, largest
        self.retried, self.tried = 0, []
        monkeypatch.setattr(cuda, "free", lambda device: self.free)
        monkeypatch.setattr(cuda, "kept", lambda device: (self.unused, self.retried))
        monkeypatch.setattr(Engine, "spare", lambda engine, *args: self.spare(*args))

    def spare(self, nbytes, device):
        self.tried.append(nbytes)
        if nbytes > max(self.free, self.largest):
            self.retried += 1  # having waited for the device
            return None
        return torch.empty(nbytes, dtype=torch.uint8)


@pytest.mark.parametrize(("free", "kept", "tried"), [(1000, 0, [100]), (0, 1000, [100]), (99, 99, []), (0, 0, [])])
def test_a_prefetch_buffer_ahead_is_tried_where_there_is_room_only(cuda, monkeypatch, free, kept, tried):
    allocator = Allocator(cuda, monkeypatch, free=free, kept=kept, largest=kept)
    place = StreamEngine(CPU, cuda=cuda).spare(100, CPU)
    assert allocator.tried == tried
    assert (place is not None) == bool(tried)
    assert allocator.retried == 0


def test_parts_that_were_too_small_are_not_tried_again(cuda, monkeypatch):
    allocator = Allocator(cuda, monkeypatch, kept=1000, largest=50)
    engine = StreamEngine(CPU, cuda=cuda)
    assert [engine.spare(n, CPU) is not None for n in (100, 100, 200, 40)] == [False, False, False, True]
    assert allocator.tried == [100, 40]
    allocator.free = 500
    assert engine.spare(100, CPU) is not None


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
