"""What "auto" may plan with, from a device's figures."""

import pytest
import torch

from memo_compile.hardware.device_memory import Allocator, Held, allocator_here, obtainable, usable
from memo_compile.hardware.profiles import PROFILES
from memo_compile.options import Options
from memo_compile.trace.setting import DEVICE_DIGITS, Setting, auto_budget, rounded_down, with_budget_now

GIB = 2**30
GPU = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch):
    """A device of 80 GiB, 50 of them free. torch has 20 reserved, 12 in use, and 3 free in segments in use."""

    def set_up(fraction=1.0, backend="native", expandable=False):
        stats = {"reserved_bytes": 20, "active_bytes": 12, "inactive_split_bytes": 3}
        nested = {name: {"all": {"current": size * GIB}} for name, size in stats.items()}
        settings = {"allocator_settings": {"expandable_segments": expandable}}
        for name, value in {
            "mem_get_info": lambda device: (50 * GIB, 80 * GIB),
            "memory_stats_as_nested_dict": lambda device: nested,
            "memory_reserved": lambda device: 20 * GIB,
            "get_per_process_memory_fraction": lambda device: fraction,
            "get_allocator_backend": lambda: backend,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: settings)

    return set_up


def test_holes_in_segments_that_are_in_use_do_not_count(device):
    device()
    assert usable(GPU, allocator_here()) == (50 + 20 - 12 - 3) * GIB


def test_holes_in_an_expandable_segment_go_back_by_pages(device):
    device(expandable=True)
    assert usable(GPU, allocator_here()) == (50 + 20 - 12) * GIB


@pytest.mark.parametrize(("fraction", "left"), [(1.0, 50), (0.5, 20), (0.25, 0), (0.1, 0)])
def test_a_process_has_no_more_than_its_share_of_the_device(device, fraction, left):
    device(fraction=fraction)
    assert obtainable(GPU) == left * GIB


@pytest.mark.parametrize(
    ("backend", "expandable", "found"),
    [
        ("native", False, Allocator.SEGMENTS),
        ("native", True, Allocator.EXPANDABLE),
        ("cudaMallocAsync", False, Allocator.UNKNOWN),
    ],
)
def test_the_allocators_rules_are_read_from_its_settings(device, backend, expandable, found):
    device(backend=backend, expandable=expandable)
    assert allocator_here() is found


def test_what_nothing_uses_are_whole_segments():
    assert Held(reserved=20, active=12, split=3).unused == 5


@pytest.mark.parametrize(("expandable", "left"), [(False, 55), (True, 58)])
def test_auto_plans_with_what_is_left_and_by_the_allocators_rules(device, expandable, left):
    device(expandable=expandable)
    setting = Setting("graph_0", Options(), GPU, PROFILES["h200"], host=0, trainable=2**30)
    now = with_budget_now(setting)
    assert now.given.budget == rounded_down(auto_budget(left * GIB, None, 2**30), DEVICE_DIGITS)
    assert now.counts_reserved
    assert now.allocator is (Allocator.EXPANDABLE if expandable else Allocator.SEGMENTS)


def test_a_budget_in_bytes_is_for_what_is_allocated(device):
    device()
    setting = Setting("graph_0", Options(memory_budget=GIB), GPU, PROFILES["h200"], host=0, trainable=0)
    now = with_budget_now(setting)
    assert now.given.budget == GIB
    assert not now.counts_reserved
