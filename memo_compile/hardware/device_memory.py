"""What a CUDA device has left for torch, and by what rules torch's allocator hands it out.

Private torch APIs, tried with torch 2.11 and 2.13: `torch.cuda.memory._snapshot` names the allocator's settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch


class Allocator(StrEnum):
    """How torch's CUDA allocator lays out what it reserves; the driver's own (`cudaMallocAsync`) is `UNKNOWN`."""

    UNKNOWN = ""
    SEGMENTS = "segments"
    EXPANDABLE = "expandable segments"


@dataclass(frozen=True)
class Held:
    """Bytes that torch's allocator has `reserved` of a device.

    Of these `active` are in use; `split` are free parts of segments of which other parts are in use. `retries` counts
    how often it had to give segments back before it could go on.
    """

    reserved: int
    active: int
    split: int
    retries: int = 0

    @property
    def unused(self) -> int:
        """Bytes of segments of which nothing is in use: they can go back to the device, whatever is asked for next."""
        return self.reserved - self.active - self.split

    def again(self, allocator: Allocator) -> int:
        """Bytes that can be had again, whatever their sizes.

        Free parts of segments in use may fit nothing, and do not count. Of expandable segments they do, since their
        pages go back one by one.
        """
        return self.reserved - self.active if allocator is Allocator.EXPANDABLE else self.unused


def held(device: torch.device) -> Held:
    """What torch's allocator holds now."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return Held(
        reserved=_current(stats, "reserved_bytes"),
        active=_current(stats, "active_bytes"),
        split=_current(stats, "inactive_split_bytes"),
        retries=int(stats.get("num_alloc_retries", 0)),
    )


def obtainable(device: torch.device) -> int:
    """Bytes that the device still gives to this process, whose share of it may be limited."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free, allowed - torch.cuda.memory_reserved(device)))


def usable(device: torch.device, allocator: Allocator) -> int:
    """Bytes that can be had on a device: of the device, and of what torch holds of it without use."""
    return obtainable(device) + held(device).again(allocator)


def _current(stats: dict[str, Any], name: str) -> int:
    return int(stats.get(name, {}).get("all", {}).get("current", 0))


def allocator_here() -> Allocator:
    """The rules that torch's allocator goes by in this process."""
    if torch.cuda.get_allocator_backend() != "native":
        return Allocator.UNKNOWN
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    return Allocator.EXPANDABLE if settings.get("expandable_segments") else Allocator.SEGMENTS
