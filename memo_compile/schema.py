"""`Plan`: all that was decided and predicted for one graph. It goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ActivationPlan:
    """One saved activation and its homes. `kept + offloaded + recomputed == tokens`, in token rows.

    `tokens` is 1 for a value that cannot be sliced; it then has one home, whole.
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
    reason: str
    layer: int | None = None

    def share(self, rows: int) -> int:
        """Bytes of `rows` of its token rows."""
        return self.bytes * rows // self.tokens


@dataclass(frozen=True)
class ArenaBuffer:
    """One buffer of the emitted code: where it lies and over which lines of the timeline it is live."""

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
    held: segments, outputs, gradients and what kernels allocate themselves. `least_peak` is the least that the program
    knows how to hold ("min" asks for it), `unplanned_peak` what the graph holds when nothing is planned. `prices` are
    the seconds that one more GiB ("device memory", "host memory") or GB/s ("offload rate", "prefetch rate") would save;
    `binding` is the one of these that costs most, or "nothing". `range` says which sizes vary and how far: bytes and
    rows are those at its upper end; "" where all are numbers.
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
    binding: str
    token_axis: str
    activations: tuple[ActivationPlan, ...]
    stops: tuple[Stop, ...] = ()
    arena_bytes: int = 0
    lower_bound: int = 0
    coverage: float = 0.0
    rounds: int = 0
    prices: Mapping[str, float] = field(default_factory=dict)
    segments: tuple[ArenaSegment, ...] = ()
    buffers: tuple[ArenaBuffer, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    range: str = ""
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
        """Bytes of saved activations that the backward makes again."""
        return sum(a.share(a.recomputed) for a in self.activations)

    @property
    def recomputed_flops_share(self) -> float:
        """FLOPs recomputed over the FLOPs of the forward."""
        return self.recomputed_flops / self.forward_flops if self.forward_flops else 0.0

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads an equal plan back."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no plan, or of another version of the schema.
        """
        raw: Any = json.loads(text)
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"plan has schema version {version!r}; this memo reads {SCHEMA_VERSION}")
        try:
            return Plan._read(raw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no plan: {type(error).__name__}: {error}") from error

    @staticmethod
    def _read(raw: dict[str, Any]) -> Plan:
        raw["activations"] = tuple(ActivationPlan(**{**a, "shape": tuple(a["shape"])}) for a in raw["activations"])
        raw["stops"] = tuple(Stop(**s) for s in raw["stops"])
        raw["segments"] = tuple(ArenaSegment(**s) for s in raw["segments"])
        raw["buffers"] = tuple(ArenaBuffer(**b) for b in raw["buffers"])
        raw["workspaces"] = tuple(Workspace(**w) for w in raw.get("workspaces", ()))  # plans before had none
        return Plan(**raw)
