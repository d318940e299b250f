"""Host memory near the GPU that copies it: on a machine with several NUMA nodes, on the node of the GPU's bus.

Linux only. Where nothing can be told, or the kernel refuses, the default policy stands: a page lies where it is first
written.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch

_SYSTEM = Path("/sys")
_MBIND = {"x86_64": 237, "aarch64": 235}  # syscall numbers, arch/x86/entry/syscalls and asm-generic/unistd.h
_MPOL_PREFERRED = 1


def nodes(system: Path = _SYSTEM) -> tuple[int, ...]:
    """The NUMA nodes that are online; one where the system does not say."""
    try:
        return parse_ranges((system / "devices/system/node/online").read_text())
    except OSError:
        return (0,)


def parse_ranges(text: str) -> tuple[int, ...]:
    """Read the kernel's list format.

    >>> parse_ranges("0-1,4")
    (0, 1, 4)
    """
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return tuple(found)


def node_of_bus(bus: str, system: Path = _SYSTEM) -> int | None:
    """The node of a PCI device (`0000:3b:00.0`); None where the system does not say, or there is only one."""
    if len(nodes(system)) < 2:
        return None
    try:
        node = int((system / "bus/pci/devices" / bus / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def node_of_device(device: torch.device) -> int | None:
    """The node of a CUDA device, the current one where `device` has no index."""
    index = torch.cuda.current_device() if device.index is None else device.index
    p: Any = torch.cuda.get_device_properties(index)
    try:
        bus = f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
    except AttributeError:
        return None
    return node_of_bus(bus)


def bind_to_node(address: int, nbytes: int, node: int | None) -> bool:
    """Ask that the pages of a fresh mapping lie on a node; whether the kernel took it. None asks for nothing."""
    number = _MBIND.get(platform.machine())
    if node is None or number is None or os.name != "posix":
        return False
    mask = (ctypes.c_ulong * 16)()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask[node // bits] = 1 << (node % bits)
    libc = ctypes.CDLL(None, use_errno=True)
    args = (address, nbytes, _MPOL_PREFERRED, ctypes.byref(mask), 16 * bits, 0)
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(a) if isinstance(a, int) else a for a in args)) == 0
