"""What a device can do: rates and sizes, built in for common accelerators, read from a file, or measured here.

Rates are datasheet peaks; the efficiencies are the shares of them that kernels reach, by size. Each profile names its
sources. `hardware/calibration.py` makes a profile of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from memo_compile.errors import InvalidOption, shown
from memo_compile.hardware.efficiency import (
    Classes,
    Efficiency,
    is_above_zero,
    read_classes,
    read_table,
    share_at,
    share_in,
)
from memo_compile.logs import logger

log = logger(__name__)


@dataclass(frozen=True)
class DeviceProfile:
    """FLOP/s by dtype, bytes/s, bytes, seconds.

    `device` is the type that torch gives it. `d2h` and `h2d` are the host link's rates each way for one device, and
    `both_ways` the share of each that is left while both are busy, which plans need not know: a slice cannot come back
    before what leaves ahead of it is out, so that the two copy at once for moments only. `link` is the rate at which a
    device receives from its peers in one machine. Efficiencies of matmuls and of fused attention are tables of (FLOPs
    of one op, share of the peak), between whose entries `share_at` interpolates; the others are shares for large
    transfers. Where shapes were measured, `matmuls_by_rows` has a table for each smallest dimension of a matmul, and
    `attention_by_heads` and its backward one for each number of sequences times heads; they are then what counts.
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    d2h: float
    h2d: float
    memory: int
    host_memory: int
    launch_overhead: float
    matmul_efficiency: Efficiency
    attention_efficiency: Efficiency
    attention_backward_efficiency: Efficiency
    device: str = "cuda"
    memory_efficiency: float = 0.9
    both_ways: float = 1.0
    link: float = 25e9
    link_efficiency: float = 0.8
    source: str = ""
    notes: tuple[str, ...] = field(default=())
    matmuls_by_rows: Classes = ()
    attention_by_heads: Classes = ()
    attention_backward_by_heads: Classes = ()

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s for a dtype; that of float32 where the profile does not name it."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])

    def matmul_share(self, flops: float, rows: float) -> float:
        """The share of the peak that a matmul reaches whose smallest dimension is `rows`."""
        if not self.matmuls_by_rows:
            return share_at(self.matmul_efficiency, flops)
        return share_in(self.matmuls_by_rows, rows, flops)

    def attention_share(self, flops: float, heads: int, *, backward: bool) -> float:
        """The share of the peak that fused attention reaches over `heads` heads of all sequences together."""
        table = self.attention_backward_efficiency if backward else self.attention_efficiency
        classes = self.attention_backward_by_heads if backward else self.attention_by_heads
        return share_in(classes, heads, flops) if classes else share_at(table, flops)


_GIB = 2**30


_A100_FLOPS = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "float64": 9.7e12}


_H100_FLOPS = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 34e12}


def _rising_to(best: float, scale: float = 1.0) -> Efficiency:
    """A table that ends at `best` for ops of a few hundred microseconds and more. Below that the device is not filled:
    these shares are estimates, for want of a published table; `memo doctor --measure` replaces them."""
    shares = ((1e8, 0.03), (1e9, 0.2), (1e10, 0.5), (1e11, 0.8), (1e12, 1.0))
    return tuple((size * scale, share * best) for size, share in shares)


_MAMF = "matmuls: 'Maximum Achievable Matmul FLOPS' in Bekman, Machine Learning Engineering"


def _efficiencies(matmul: Efficiency, attention: Efficiency, backward: Efficiency) -> dict[str, Any]:
    return {
        "matmul_efficiency": matmul,
        "attention_efficiency": attention,
        "attention_backward_efficiency": backward,
    }


_A100_EFFICIENCIES = _efficiencies(_rising_to(0.859), _rising_to(0.70, 0.3), _rising_to(0.60, 0.3))


_A100_SOURCES = (
    f"{_MAMF}: 267.9 of 312 TFLOP/s; attention: FlashAttention-2 (arXiv 2307.08691), up to 73 % forward, 63 % backward"
)


# Of matmuls of a model 4 096 wide, and of cuDNN's attention, which torch takes on this chip. Traced in a step of 64K
# tokens on an H200 under its power limit, with torch 2.11, their kernels reached 75, 62 and 52 %. Whole steps of 64K to
# 256K tokens took 4 to 5 % longer than these say; with the shares below, 0.2 to 1.0 %. Small ones from `memo doctor`.
# No classes by shape: over 32 heads attention reaches one share at 16K to 112K tokens (`tests/bench/test_profile.py`),
# and no row tells of other numbers of heads, nor of matmuls of fewer rows than a model is wide.
_HOPPER_EFFICIENCIES = _efficiencies(_rising_to(0.70, 0.3), _rising_to(0.60, 2.0), _rising_to(0.503, 10.0))


_ON_HOPPER = (
    "matmuls at 70 %, attention at 60 % forward and 50 % backward, so that training steps on an H200 take as long as "
    "they did (bench/results/gpu.md)"
)


_FLASH2_ON_H100 = "attention: FlashAttention-2 reaches 35 to 40 % on an H100 (arXiv 2407.08608)"


PROFILES: dict[str, DeviceProfile] = {
    "a100-80gb": DeviceProfile(
        name="a100-80gb",
        peak_flops=_A100_FLOPS,
        memory_bandwidth=2.039e12,
        d2h=25e9,
        h2d=25e9,
        memory=80 * _GIB,
        host_memory=256 * _GIB,
        launch_overhead=5e-6,
        **_A100_EFFICIENCIES,
        link=300e9,
        source=f"NVIDIA A100 SXM datasheet, PCIe 4 x16, NVLink 600 GB/s; {_A100_SOURCES}",
    ),
    "a800-80gb": DeviceProfile(
        name="a800-80gb",
        peak_flops=_A100_FLOPS,
        memory_bandwidth=2.039e12,
        d2h=12.5e9,
        h2d=12.5e9,
        memory=80 * _GIB,
        host_memory=256 * _GIB,
        launch_overhead=5e-6,
        **_A100_EFFICIENCIES,
        link=200e9,
        source=f"NVIDIA A800 datasheet: an A100 with NVLink 400 GB/s; {_A100_SOURCES}",
        notes=(
            "the host link is shared by two devices, as on the machines of MEMO (arXiv 2407.12117): 12.5 GB/s each",
        ),
    ),
    "h100-80gb": DeviceProfile(
        name="h100-80gb",
        peak_flops=_H100_FLOPS,
        memory_bandwidth=3.35e12,
        d2h=50e9,
        h2d=50e9,
        memory=78 * _GIB,
        host_memory=256 * _GIB,
        launch_overhead=4e-6,
        **_HOPPER_EFFICIENCIES,
        link=450e9,
        source=(
            "NVIDIA H100 SXM datasheet, PCIe 5 x16, NVLink 900 GB/s; memory as seen on one; the same chip as the "
            f"H200: {_ON_HOPPER}"
        ),
    ),
    "h200": DeviceProfile(
        name="h200",
        peak_flops=_H100_FLOPS,
        memory_bandwidth=4.8e12,
        d2h=55e9,
        h2d=55e9,
        memory=139 * _GIB,
        host_memory=128 * _GIB,
        launch_overhead=4e-6,
        **_HOPPER_EFFICIENCIES,
        both_ways=0.9,
        link=450e9,
        source=(
            "NVIDIA H200 SXM datasheet, PCIe 5 x16, NVLink 900 GB/s; memory as seen on one, copies to the host at "
            f"55 GB/s each way, 50 at once, and in device memory at 4.3 TB/s measured with torch 2.11; {_ON_HOPPER}"
        ),
    ),
    "b200": DeviceProfile(
        name="b200",
        peak_flops={"bfloat16": 2250e12, "float16": 2250e12, "float32": 75e12, "float64": 37e12},
        memory_bandwidth=8e12,
        d2h=50e9,
        h2d=50e9,
        memory=180 * 10**9,
        host_memory=256 * _GIB,
        launch_overhead=4e-6,
        matmul_efficiency=_rising_to(0.776, 6.0),
        attention_efficiency=_rising_to(0.35, 2.0),
        attention_backward_efficiency=_rising_to(0.30, 2.0),
        link=900e9,
        source=f"NVIDIA B200 datasheet, PCIe 5 x16, NVLink 1.8 TB/s; {_MAMF}: 1745 of 2250 TFLOP/s",
        notes=("attention: assumed, by analogy with FlashAttention-2 on the H100",),
    ),
    "cpu": DeviceProfile(
        name="cpu",
        peak_flops={"float32": 1.0e11, "float64": 5.0e10, "bfloat16": 5.0e10, "float16": 2.5e10},
        memory_bandwidth=1.0e10,
        d2h=4.0e9,
        h2d=4.0e9,
        memory=16 * _GIB,
        host_memory=16 * _GIB,
        launch_overhead=2e-6,
        matmul_efficiency=((1e4, 0.007), (1e5, 0.06), (1e6, 0.35), (1e7, 0.64), (1e8, 0.7)),
        attention_efficiency=((1e4, 0.004), (1e5, 0.04), (1e6, 0.2), (1e7, 0.36), (1e8, 0.4)),
        attention_backward_efficiency=((1e4, 0.004), (1e5, 0.04), (1e6, 0.2), (1e7, 0.36), (1e8, 0.4)),
        device="cpu",
        memory_efficiency=1.0,
        link=1e9,
        link_efficiency=1.0,
        source="two cores with AVX2 at 3 GHz: 16 float32 FMAs a cycle; memcpy rates as measured on such a machine",
    ),
}


_ALIASES = {"a100": "a100-80gb", "a800": "a800-80gb", "h100": "h100-80gb"}


def resolve(hardware: str, device: str = "cpu") -> DeviceProfile:
    """The profile of a name, a JSON file, or "auto": the one measured on this machine, else by the device's name.

    Raises:
        InvalidOption: neither a built-in profile nor a readable file.
    """
    if hardware == "auto":
        return measured_here(device) or built_in(device)
    name = _ALIASES.get(hardware.lower(), hardware.lower())
    if name in PROFILES:
        return PROFILES[name]
    path = Path(hardware)
    there = False
    with contextlib.suppress(OSError, ValueError):  # no name that a file could have
        there = path.is_file()
    if there:
        return load(path)
    raise InvalidOption("hardware", hardware, f'"auto", one of {", ".join(PROFILES)}, or a profile\'s JSON file')


def built_in(device: str) -> DeviceProfile:
    """The built-in profile that is nearest to this machine's device of a type."""
    return PROFILES[_detect(device)]


def is_calibrated(profile: DeviceProfile) -> bool:
    """Whether the rates are a machine's own, and not those of a built-in profile."""
    return profile not in PROFILES.values()


def measured_here(device: str) -> DeviceProfile | None:
    """What `memo doctor --measure` stored for this type of device; None where there is none, or another machine's."""
    stored = stored_profile(device)
    if not stored.exists():
        return None
    profile = load(stored)
    if profile.device == device and profile.name == machine_name(device):
        return profile
    log.warning("%s is of %s (%s), not of this machine: it is not used", stored, profile.name, profile.device)
    return None


def machine_name(device: str) -> str:
    """What tells a device from others of its type: its model, and for a CPU the number of cores."""
    if device == "cuda":
        import torch  # takes a second, and not every caller needs it

        return torch.cuda.get_device_name()
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _detect(device: str) -> str:
    if device != "cuda":
        return "cpu"
    import torch  # takes a second, and not every caller needs it

    name = torch.cuda.get_device_name().lower()
    for key in ("h200", "b200", "h100", "a800", "a100"):
        if key in name:
            return _ALIASES.get(key, key)
    log.warning("no built-in profile for %s: costs are those of an A100; run `memo doctor --measure`", name)
    return "a100-80gb"


def stored_profile(device: str) -> Path:
    """Where `memo doctor --measure` keeps this machine's profile; MEMO_PROFILES names another folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memo_compile"
    return Path(os.environ.get("MEMO_PROFILES", cache)) / f"profile-{device}.json"


_TABLES = ("matmul_efficiency", "attention_efficiency", "attention_backward_efficiency")


_RENAMED = {"products_by_rows": "matmuls_by_rows"}  # fields, as profiles of before have them


_CLASSES = ("matmuls_by_rows", "attention_by_heads", "attention_backward_by_heads")


_ABOVE_ZERO = (
    "memory_bandwidth",
    "d2h",
    "h2d",
    "memory",
    "host_memory",
    "memory_efficiency",
    "both_ways",
    "link",
    "link_efficiency",
)


def from_fields(raw: Mapping[str, Any]) -> DeviceProfile:
    """A profile from the fields that `dataclasses.asdict` gives, be it by way of JSON.

    Raises:
        TypeError, ValueError: they are not those of a profile.
    """
    values = {_RENAMED.get(name, name): value for name, value in dict(raw).items()}
    for name in _TABLES:
        values[name] = read_table(name, values.get(name, ()))
    for name in _CLASSES:
        values[name] = read_classes(name, values.get(name, ()))
    values["notes"] = tuple(values.get("notes", ()))
    profile = DeviceProfile(**values)
    for name in _ABOVE_ZERO:
        value = getattr(profile, name)
        if not is_above_zero(value):
            raise ValueError(f"{name} = {shown(value)} must be a finite number above 0")
    if profile.launch_overhead != 0 and not is_above_zero(profile.launch_overhead):
        raise ValueError(f"launch_overhead = {shown(profile.launch_overhead)} must be a finite number of at least 0")
    flops = profile.peak_flops
    if not isinstance(flops, Mapping) or "float32" not in flops or not all(map(is_above_zero, flops.values())):
        raise ValueError(f"peak_flops = {shown(flops)} must name float32, and each be a finite number above 0")
    return profile


def load(path: Path) -> DeviceProfile:
    """Read a profile from JSON.

    Raises:
        InvalidOption: the file is no profile.
    """
    try:
        return from_fields(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        known = ", ".join(f.name for f in fields(DeviceProfile))
        raise InvalidOption("hardware", str(path), f"a JSON file with a profile's fields, {known} ({error})") from error


def save(profile: DeviceProfile, path: Path) -> None:
    """Write a profile as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(profile), indent=1), encoding="utf-8")
