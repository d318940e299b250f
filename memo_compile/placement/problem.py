"""What is placed: buffers with a size and a half-open lifetime; and the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from memo_compile.errors import FixedOffsetImpossible, InvalidBuffer, InvalidOption

LARGEST = 2**62  # bytes and steps: solvers count in 64 bits


@dataclass(frozen=True)
class Buffer:
    """`size` bytes, live over the half-open range of steps [start, end).

    `alias` names a buffer whose offset this one shares: together they are one storage, as large as the largest and
    live from the first birth to the last death. `prefer` is the end of the arena that it would rather lie at:
    "low", "high" or "any". Preferences never cost a byte of peak.
    """

    name: str
    size: int
    start: int
    end: int
    alias: str | None = None
    prefer: str = "any"


@dataclass(frozen=True)
class Evidence:
    """A moment that proves a capacity too small: `live` bytes of `buffers` (by name) at `step`."""

    step: int
    live: int
    buffers: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Offsets in bytes by name. `peak` is the end of the highest buffer; no placement is below `lower_bound`.

    Both are of sizes rounded up to the alignment.

    `fits` says whether the asked capacity is met: True, False (proved), or None (not known in the time).
    Where it is not True, `reason` says what is proved, and `evidence` is the moment that proves it, if one does.
    `proved_optimal` may hold above `lower_bound`: a complete search has then shown that nothing smaller is possible.
    """

    offsets: dict[str, int]
    peak: int
    lower_bound: int
    proved_optimal: bool
    solver: str
    seconds: float
    fits: bool | None = True
    evidence: Evidence | None = None
    reason: str = ""


def aligned(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def _is_whole(value: object) -> bool:
    return type(value) is int or isinstance(value, Integral)  # the first for speed: most are


def check(buffers: Sequence[Buffer], alignment: int = 1) -> None:
    """Reject what is no problem.

    Raises:
        InvalidBuffer: no whole numbers, a negative size, an empty lifetime, more than 2**62 steps or bytes in all, a
            name given twice, an alias of nothing or of itself.
    """
    by_name: dict[str, Buffer] = {}
    total = 0
    for b in buffers:
        if not isinstance(b, Buffer) or not (_is_whole(b.size) and _is_whole(b.start) and _is_whole(b.end)):
            raise InvalidBuffer(f"{b!r} is no Buffer whose size, start and end are whole numbers")
        total += aligned(int(b.size), alignment)
        if total > LARGEST or b.start < -LARGEST or b.end > LARGEST:
            raise InvalidBuffer(f"buffer {b.name!r}: more than 2**62 bytes in all, or steps, cannot be placed")
        if b.size < 0 or b.end <= b.start:
            raise InvalidBuffer(f"buffer {b.name!r}: size {b.size} and lifetime [{b.start}, {b.end}) are not possible")
        if b.name in by_name:
            raise InvalidBuffer(f"buffer {b.name!r} is given twice")
        if b.prefer not in ("any", "low", "high"):
            raise InvalidBuffer(f'buffer {b.name!r}: prefer={b.prefer!r} is none of "any", "low", "high"')
        by_name[b.name] = b
    for b in buffers:
        seen, now = {b.name}, b
        while now.alias is not None:
            if now.alias not in by_name:
                raise InvalidBuffer(f"buffer {now.name!r} is an alias of {now.alias!r}, which is not there")
            if now.alias in seen:
                raise InvalidBuffer(f"buffer {b.name!r} is an alias of itself, by way of {now.name!r}")
            seen.add(now.alias)
            now = by_name[now.alias]


def check_limits(alignment: int, capacity: int | None, time_limit: float, work: int | None) -> None:
    """Reject numbers that no placement can be asked for.

    Raises:
        InvalidOption: names the argument, its value and what is allowed.
    """
    if not isinstance(alignment, Integral) or alignment < 1:
        raise InvalidOption("alignment", alignment, "a positive number of bytes")
    if capacity is not None and (not isinstance(capacity, Integral) or capacity < 0):
        raise InvalidOption("capacity", capacity, "bytes, zero or more, or None")
    if not isinstance(time_limit, Real) or not time_limit >= 0:
        raise InvalidOption("time_limit", time_limit, "seconds, zero or more")
    if work is not None and (not isinstance(work, Integral) or work < 0):
        raise InvalidOption("work", work, "nodes of search, zero or more, or None")


def of_roots(fixed: Mapping[str, int], roots: Mapping[str, str]) -> dict[str, int]:
    """Fixed offsets of aliases as those of what they are aliases of.

    Raises:
        FixedOffsetImpossible: two of one storage are to lie at different offsets.
    """
    found: dict[str, int] = {}
    for name, offset in fixed.items():
        root = roots.get(name, name)
        if found.setdefault(root, offset) != offset:
            raise FixedOffsetImpossible(
                f"fixed[{name!r}] = {offset}, but it shares its offset with one at {found[root]}"
            )
    return found


def check_fixed(buffers: Sequence[Buffer], fixed: Mapping[str, int], alignment: int) -> None:
    """Reject fixed offsets that cannot hold together. `buffers` have no aliases among them.

    Raises:
        FixedOffsetImpossible: an unknown name, an offset that is negative or not aligned, two that share bytes.
    """
    by_name = {b.name: b for b in buffers}
    placed: list[Buffer] = []
    for name, offset in fixed.items():
        if name not in by_name:
            raise FixedOffsetImpossible(f"fixed[{name!r}]: there is no such buffer")
        if not isinstance(offset, Integral) or offset < 0 or offset % alignment or offset > LARGEST:
            raise FixedOffsetImpossible(f"fixed[{name!r}] = {offset} must be a multiple of {alignment}, zero or more")
        b = by_name[name]
        for other in placed:
            if (
                b.start < other.end
                and other.start < b.end
                and offset < fixed[other.name] + other.size
                and fixed[other.name] < offset + b.size
            ):
                raise FixedOffsetImpossible(
                    f"fixed[{name!r}] = {offset} and fixed[{other.name!r}] = {fixed[other.name]} share bytes "
                    f"from step {max(b.start, other.start)} to {min(b.end, other.end)}"
                )
        placed.append(b)
