"""What a device can do: rates and sizes, built in for common accelerators, or read from a file.

Rates are datasheet peaks; `efficiency` is the share of them that large kernels reach. Each names its source.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from memo_compile.errors import InvalidOption


@dataclass(frozen=True)
class DeviceProfile:
    """FLOP/s by dtype, bytes/s, bytes, seconds.

    `d2h` and `h2d` are the host link's rates each way for one device. `matmul_efficiency` and `attention_efficiency`
    are shares of the peak reached by large matrix products and fused attention; `half_size` is the number of FLOPs of a
    product at which half of that share is reached.
    """

    name: str
    peak_flops: dict[str, float]
    memory_bandwidth: float
    d2h: float
    h2d: float
    memory: int
    host_memory: int
    launch_overhead: float
    matmul_efficiency: float = 0.75
    attention_efficiency: float = 0.55
    half_size: float = 5e9
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s for a dtype; that of float32 where the profile does not name it."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])


_GIB = 2**30

_A100 = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "float64": 9.7e12}
_H100 = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 34e12}

PROFILES: dict[str, DeviceProfile] = {
    "a100-80gb": DeviceProfile(
        "a100-80gb",
        _A100,
        2.039e12,
        25e9,
        25e9,
        80 * _GIB,
        256 * _GIB,
        5e-6,
        source="NVIDIA A100 datasheet; PCIe 4",
    ),
    "a800-80gb": DeviceProfile(
        "a800-80gb",
        _A100,
        2.039e12,
        12.5e9,
        12.5e9,
        80 * _GIB,
        256 * _GIB,
        5e-6,
        source="NVIDIA A800 datasheet (A100 with slower NVLink); link shared by two GPUs as in MEMO, section 5.1",
    ),
    "h100-80gb": DeviceProfile(
        "h100-80gb",
        _H100,
        3.35e12,
        50e9,
        50e9,
        80 * _GIB,
        256 * _GIB,
        4e-6,
        source="NVIDIA H100 datasheet; PCIe 5",
    ),
    "h200": DeviceProfile(
        "h200",
        _H100,
        4.8e12,
        50e9,
        50e9,
        141 * 10**9,
        128 * _GIB,
        4e-6,
        0.79,
        0.55,
        source="NVIDIA H200 datasheet; PCIe 5",
    ),
    "b200": DeviceProfile(
        "b200",
        {"bfloat16": 2250e12, "float16": 2250e12, "float32": 75e12, "float64": 37e12},
        8e12,
        50e9,
        50e9,
        180 * 10**9,
        256 * _GIB,
        4e-6,
        source="NVIDIA B200 datasheet; PCIe 5 x16",
    ),
    "cpu": DeviceProfile(
        "cpu",
        {"float32": 1.0e11, "float64": 5.0e10, "bfloat16": 5.0e10, "float16": 2.5e10},
        1.0e10,
        4.0e9,
        4.0e9,
        16 * _GIB,
        16 * _GIB,
        2e-6,
        0.7,
        0.4,
        1e6,
        source="two cores with AVX2 at 3 GHz: 16 float32 FMAs a cycle; memcpy rates as measured on such a machine",
    ),
}

_ALIASES = {"a100": "a100-80gb", "a800": "a800-80gb", "h100": "h100-80gb"}


def resolve(hardware: str, device: str = "cpu") -> DeviceProfile:
    """The profile of a name, a JSON file, or "auto": a measured one where there is one, else by the device's name.

    Raises:
        InvalidOption: neither a built-in profile nor a readable file.
    """
    if hardware == "auto":
        stored = stored_profile()
        if stored.exists():
            return load(stored)
        return PROFILES[_detect(device)]
    name = _ALIASES.get(hardware.lower(), hardware.lower())
    if name in PROFILES:
        return PROFILES[name]
    path = Path(hardware)
    if path.is_file():
        return load(path)
    raise InvalidOption("hardware", hardware, f'"auto", one of {", ".join(PROFILES)}, or a profile\'s JSON file')


def _detect(device: str) -> str:
    if device != "cuda":
        return "cpu"
    import torch

    name = torch.cuda.get_device_name().lower()
    for key in ("h200", "b200", "h100", "a800", "a100"):
        if key in name:
            return _ALIASES.get(key, key)
    return "a100-80gb"


def stored_profile() -> Path:
    """Where `memo doctor --measure` keeps this machine's profile."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "memo_compile" / "profile.json"


def load(path: Path) -> DeviceProfile:
    """Read a profile from JSON.

    Raises:
        InvalidOption: the file is no profile.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return DeviceProfile(**{**raw, "notes": tuple(raw.get("notes", ()))})
    except (OSError, ValueError, TypeError) as error:
        raise InvalidOption("hardware", str(path), f"a JSON file with the fields of DeviceProfile ({error})") from error


def save(profile: DeviceProfile, path: Path) -> None:
    """Write a profile as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(profile), indent=1), encoding="utf-8")


def free_host_memory() -> int:
    """Bytes of host memory that this process may still take: what is free, capped by the limits of its cgroup."""
    free = _meminfo_available()
    limit = _cgroup_left()
    return free if limit is None else min(free, limit)


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_AVPHYS_PAGES"))


def _cgroup_left() -> int | None:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(limit).read_text().strip()
            if text != "max":
                return max(0, int(text) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return None
