"""`Plan`: all that was decided and predicted for one graph. It goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 2
READABLE = (1, 2)  # version 1 said causes in words alone, and sides in the names of buffers


class Cause(StrEnum):
    """Why a saved activation has the homes that it has. Words are for people: see `in_words`."""

    FITS = "fits"
    SMALL = "small"
    SHARED_STORAGE = "shared storage"
    POLICY_KEPT = "policy: kept"
    POLICY_OFFLOADED = "policy: offloaded"
    NO_TOKEN_AXIS = "no token axis"
    SLICED = "sliced"
    SLICED_NOT_RECOMPUTED = "sliced, not recomputed"
    SLICED_RECOMPUTED_WHOLE = "sliced, recomputed whole"

    @property
    def keeps(self) -> bool:
        """Whether it was kept before anything was decided."""
        return self in (Cause.FITS, Cause.SMALL, Cause.SHARED_STORAGE, Cause.POLICY_KEPT)


_WORDS: Mapping[Cause, str] = {
    Cause.FITS: "kept: the budget allows it",
    Cause.SMALL: "kept: below {}",
    Cause.SHARED_STORAGE: "kept: its storage is an output's or another value's",
    Cause.POLICY_KEPT: "kept: a policy of the user's checkpoints says so",
    Cause.POLICY_OFFLOADED: "offloaded: a policy of the user's checkpoints says so",
    Cause.NO_TOKEN_AXIS: "whole: no token axis reaches it",
    Cause.SLICED: "sliced",
    Cause.SLICED_NOT_RECOMPUTED: "sliced; not recomputed: its last bits decide something, or it must not run twice",
    Cause.SLICED_RECOMPUTED_WHOLE: "sliced; recomputed whole or not at all: {}",
}


def in_words(cause: Cause, detail: str) -> str:
    """A cause for people to read.

    >>> in_words(Cause.SMALL, "1024 bytes")
    'kept: below 1024 bytes'
    """
    return _WORDS[cause].format(detail)


class Binding(StrEnum):
    """What limits a plan: where one more unit would save most of the step."""

    NOTHING = "nothing"
    DEVICE_MEMORY = "device memory"
    HOST_MEMORY = "host memory"
    OFFLOAD_RATE = "offload rate"
    PREFETCH_RATE = "prefetch rate"


class Side(StrEnum):
    """The graph whose code makes a buffer of the arena."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class ActivationPlan:
    """One saved activation and its homes. `kept + offloaded + recomputed == tokens`, in token rows.

    `tokens` is 1 for a value that cannot be sliced; it then has one home, whole. `cause` is why, `detail` what differs
    between activations of one cause; JSON has both, and `reason` beside them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    source: str
    tokens: int
    kept: int
    offloaded: int
    recomputed: int
    cause: Cause
    detail: str = ""
    layer: int | None = None

    @property
    def reason(self) -> str:
        """The cause in words."""
        return in_words(self.cause, self.detail)

    def share(self, rows: int) -> int:
        """Bytes of `rows` of its token rows."""
        return self.bytes * rows // self.tokens


@dataclass(frozen=True)
class ArenaBuffer:
    """One buffer of the emitted code of one side: where it lies and over which lines of the timeline it is live.

    A forward and its backward may have buffers of one name.
    """

    side: Side
    name: str
    segment: str
    offset: int
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class ArenaSegment:
    """One storage of the arena, held over the half-open range of timeline steps [start, end)."""

    name: str
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class Workspace:
    """What one call of a kernel allocates for itself, beyond its results: bytes, and how they are known."""

    node: str
    op: str
    bytes: int
    how: str
    source: str


@dataclass(frozen=True)
class Stop:
    """An op at which the token axis ended, and the source line that called it."""

    node: str
    op: str
    source: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """All that memo decided and predicted for one graph. Bytes and seconds throughout.

    `predicted_peak` counts what the compiled forward and backward hold on the device above what the caller already
    held: segments, outputs, gradients and what kernels allocate themselves; `predicted_reserved` what torch's allocator
    takes of the device for that, as much where its rules are not known, and 0 where no code was emitted. `least_peak`
    is the least that the program knows how to hold ("min" asks for it), `unplanned_peak` what the graph holds when
    nothing is planned. `prices` are the seconds that one more GiB ("device memory", "host memory") or GB/s ("offload
    rate", "prefetch rate") would save; `binding` is the one of these that costs most, if any does. `range` says which
    sizes vary and how far: bytes and rows are those at its upper end; "" where all are numbers. Peaks are for `calls`
    of the graph that are between their forward and their backward at once; all other bytes and seconds are of one.
    """

    name: str
    backend: str
    budget: int | None
    predicted_peak: int
    least_peak: int
    unplanned_peak: int
    predicted_seconds: float
    host_bytes: int
    forward_flops: int
    recomputed_flops: int
    solver: str
    seconds: float
    binding: Binding
    token_axis: str
    activations: tuple[ActivationPlan, ...]
    stops: tuple[Stop, ...] = ()
    arena_bytes: int = 0
    lower_bound: int = 0
    coverage: float = 0.0
    rounds: int = 0
    prices: Mapping[Binding, float] = field(default_factory=dict)
    segments: tuple[ArenaSegment, ...] = ()
    buffers: tuple[ArenaBuffer, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    range: str = ""
    calls: int = 1
    predicted_reserved: int = 0
    version: int = field(default=SCHEMA_VERSION)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes that one step copies to the host."""
        return sum(a.share(a.offloaded) for a in self.activations)

    @property
    def kept_bytes(self) -> int:
        """Bytes of saved activations that stay on the device between forward and backward."""
        return sum(a.share(a.kept) for a in self.activations)

    @property
    def recomputed_bytes(self) -> int:
        """Bytes of saved activations that the backward recomputes."""
        return sum(a.share(a.recomputed) for a in self.activations)

    @property
    def recomputed_flops_share(self) -> float:
        """FLOPs recomputed over the FLOPs of the forward."""
        return self.recomputed_flops / self.forward_flops if self.forward_flops else 0.0

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads an equal plan back."""
        raw = asdict(self)
        for activation, written in zip(self.activations, raw["activations"], strict=True):
            written["reason"] = activation.reason
        return json.dumps(raw, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no plan, or of another version of the schema.
        """
        raw: Any = json.loads(text)
        version = raw.get("version") if isinstance(raw, dict) else None
        if version not in READABLE:
            raise ValueError(f"plan has schema version {version!r}; this memo reads {SCHEMA_VERSION}")
        try:
            return _plan({**raw, "version": SCHEMA_VERSION})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no plan: {type(error).__name__}: {error}") from error


def _plan(raw: dict[str, Any]) -> Plan:
    raw["activations"] = tuple(_activation(a) for a in raw["activations"])
    raw["stops"] = tuple(Stop(**s) for s in raw["stops"])
    raw["segments"] = tuple(ArenaSegment(**s) for s in raw["segments"])
    raw["buffers"] = tuple(_buffer(b) for b in raw["buffers"])
    raw["workspaces"] = tuple(Workspace(**w) for w in raw.get("workspaces", ()))  # plans before had none
    raw["prices"] = {Binding(name): price for name, price in raw["prices"].items()}
    return Plan(**raw | {"binding": Binding(raw["binding"])})


def _activation(raw: Mapping[str, Any]) -> ActivationPlan:
    known = {k: v for k, v in raw.items() if k != "reason"}
    if "cause" not in raw:
        known["cause"], known["detail"] = _cause_of(raw["reason"])
    return ActivationPlan(**known | {"shape": tuple(raw["shape"]), "cause": Cause(known["cause"])})


# Words of version 1, whatever words are used now.
_CAUSES_OF_VERSION_1 = (
    ("kept: the budget", Cause.FITS),
    ("kept: below ", Cause.SMALL),
    ("kept: its storage", Cause.SHARED_STORAGE),
    ("kept: a policy", Cause.POLICY_KEPT),
    ("offloaded: a policy", Cause.POLICY_OFFLOADED),
    ("whole: no token axis", Cause.NO_TOKEN_AXIS),
    ("sliced; not recomputed", Cause.SLICED_NOT_RECOMPUTED),
    ("sliced; recomputed whole or not at all: ", Cause.SLICED_RECOMPUTED_WHOLE),
    ("sliced", Cause.SLICED),
)


def _cause_of(reason: str) -> tuple[Cause, str]:
    for begins, cause in _CAUSES_OF_VERSION_1:
        if reason.startswith(begins):
            return cause, reason.removeprefix(begins) if begins.endswith(" ") else ""
    raise ValueError(f"the reason {reason!r} is none of version 1")


def _buffer(raw: Mapping[str, Any]) -> ArenaBuffer:
    if "side" in raw:
        return ArenaBuffer(**{**raw, "side": Side(raw["side"])})
    side, _, name = raw["name"].partition(":")
    return ArenaBuffer(**{**raw, "side": Side.FORWARD if side == "fw" else Side.BACKWARD, "name": name})
