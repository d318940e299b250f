"""What both backends share: from options and a joint graph to limits, a name, and a recorded plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memo_compile.errors import ReserveTooLarge
from memo_compile.hardware.profiles import DeviceProfile, free_host_memory, resolve
from memo_compile.logs import announce
from memo_compile.options import Options
from memo_compile.planning.planner import Limits
from memo_compile.registry import registry
from memo_compile.schema import Plan

HOST_SHARE = 0.5  # of the free host memory, for host_budget="auto": the rest is for data loaders and the system
MARGIN = 0.05  # of the free device memory, which "auto" leaves alone: fragmentation, libraries' workspaces
BYTES_PER_TRAINABLE = 8  # a gradient and two moments, in part there already: what "auto" leaves room for


@dataclass(frozen=True)
class Setting:
    """The surroundings of one graph's compilation."""

    name: str
    options: Options
    device: torch.device
    profile: DeviceProfile
    host: int
    trainable: int


def setting_for(options: Options, inputs: Sequence[Any]) -> Setting:
    """Resolve what does not depend on the graph: device, profile, host budget, a name.

    `trainable` counts the elements of the parameters that want gradients.
    """
    device = next((v.device for v in inputs if isinstance(v, torch.Tensor) and v.device.type != "cpu"), None)
    device = device or torch.device("cpu")
    trainable = sum(v.numel() for v in inputs if isinstance(v, torch.Tensor) and v.requires_grad and v.is_leaf)
    profile = resolve(options.hardware, device.type)
    return Setting(registry().next_name(), options, device, profile, _host_budget(options), trainable)


def _host_budget(options: Options) -> int:
    if isinstance(options.host_budget, int):
        return options.host_budget
    from memo_compile.runtime.ops import pool

    return pool().held_bytes + int(free_host_memory() * HOST_SHARE)


def limits_for(setting: Setting, unplanned_peak: int) -> Limits:
    """The limits in bytes. `unplanned_peak` is what a ratio is of."""
    o = setting.options
    budget: int | None = None
    if isinstance(o.memory_budget, float):
        budget = int(o.memory_budget * unplanned_peak)
    elif isinstance(o.memory_budget, int):
        budget = o.memory_budget
    elif o.memory_budget == "auto" and setting.device.type == "cuda":
        budget = auto_budget(_free_on_device(setting.device), o.reserve, setting.trainable)
    return Limits(
        budget=budget,
        host=setting.host,
        offload=o.offload,
        recompute=o.recompute,
        slice_tokens=o.token_slice if isinstance(o.token_slice, int) else 0,
        time_limit=o.solver_time_limit,
        objective="memory" if o.memory_budget == "min" else "time",
    )


def auto_budget(free: int, reserve: int | None, trainable: int) -> int:
    """The bytes of `memory_budget="auto"`: what is free on the device, less a margin and what is to come.

    Raises:
        ReserveTooLarge: nothing is left.
    """
    kept = BYTES_PER_TRAINABLE * trainable if reserve is None else reserve
    usable = int(free * (1 - MARGIN))
    if kept >= usable:
        raise ReserveTooLarge(kept, free, usable)
    return usable - kept


def _free_on_device(device: torch.device) -> int:
    """Bytes that the device has free, and those that torch holds of it without use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def record(plan: Plan) -> None:
    """Keep a plan for `plans()`, and say what it is."""
    registry().add(plan)
    announce(plan)
