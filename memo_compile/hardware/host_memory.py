"""Host memory that this process may still take: what is free, and what its cgroups allow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


def memory_limit() -> int | None:
    """Bytes that this process's cgroups allow; None where they set no limit."""
    return min((group.allowed for group in cgroup_limits()), default=None)


def free_host_memory() -> int:
    """Bytes of host memory that this process may still take: what is free, capped by the limits of its cgroups."""
    return min([_meminfo_available(), *(group.free for group in cgroup_limits())])


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_AVPHYS_PAGES"))


@dataclass(frozen=True)
class CgroupLimit:
    """Bytes that a cgroup allows, and what is left of them."""

    allowed: int
    free: int


@dataclass(frozen=True)
class _Files:
    """What a version of cgroups calls its files, and the page cache in its statistics."""

    limit: str
    used: str
    cache: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


_NO_LIMIT = 2**60  # what version 1 writes for none is more


def cgroup_limits(
    mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[CgroupLimit]:
    """The limits that hold for this process: that of its own cgroup, and of each group above it.

    A container may be told its path on the host, of which it sees only its own group, as the root: what is not there
    is passed over.
    """
    own = _own_groups(membership)
    hierarchies = (
        (mount, "", _VERSION_2),
        (mount / "unified", "", _VERSION_2),
        (mount / "memory", "memory", _VERSION_1),
    )
    found = []
    for root, controller, files in hierarchies:
        group = own.get(controller, PurePosixPath())
        found += [_limit_of(root / above, files) for above in (group, *group.parents)]
    return [limit for limit in found if limit is not None]


def _own_groups(membership: Path) -> dict[str, PurePosixPath]:
    """The process's group by controller, from the root of its hierarchy; version 2 names none, and is ""."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return {}
    groups = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), PurePosixPath(path.lstrip("/"))))
    return groups


def _limit_of(group: Path, files: _Files) -> CgroupLimit | None:
    """A group's limit; None where it sets none ("max"), or is not there."""
    try:
        allowed = int((group / files.limit).read_text())
        used = int((group / files.used).read_text())
        free = allowed - used + _stat(group / "memory.stat", files.cache)
    except (OSError, ValueError):
        return None
    return CgroupLimit(allowed, max(0, free)) if allowed < _NO_LIMIT else None


def _stat(path: Path, key: str) -> int:
    """A line of a cgroup's statistics; here the page cache that the kernel gives up first."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(value) for name, value in lines if name == key), 0)
