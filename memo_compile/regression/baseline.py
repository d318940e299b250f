"""Baselines: the figures of training steps in a file that is committed, and what became of them.

A change beyond its tolerance is a regression, and names the tensors behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from memo_compile.errors import InvalidBaseline, InvalidOption

VERSION = 1
BLAMED = 5  # tensors named for one regression


@dataclass(frozen=True)
class Metric:
    """One figure of a target. `tolerance` is the share of the baseline by which it may worsen."""

    label: str
    unit: str
    tolerance: float
    higher_is_better: bool = False


METRICS: Mapping[str, Metric] = {
    "peak": Metric("peak", "MiB", 0.01),
    "arena": Metric("arena / lower bound", "", 0.01),
    "coverage": Metric("coverage", "", 0.01, higher_is_better=True),
    "host": Metric("host memory", "MiB", 0.01),
    "out": Metric("moved to the host", "MiB", 0.02),
    "in": Metric("moved back", "MiB", 0.02),
    "flops": Metric("recomputed", "MFLOP", 0.02),
    "step": Metric("predicted step", "ms", 0.02),
    "breaks": Metric("graph breaks", "", 0.0),
    "unsliceable": Metric("unsliceable tensors", "", 0.0),
    "planning": Metric("planning / calibration", "", 1.0),
}


@dataclass(frozen=True)
class SavedTensor:
    """One saved activation: its source line, and its bytes in each home; `whole` are bytes that cannot be sliced."""

    name: str
    source: str
    bytes: int
    kept: int
    offloaded: int
    recomputed: int
    whole: int


@dataclass(frozen=True)
class Figures:
    """What one target came to: metrics in bytes, FLOPs and seconds, tensors, and words that explain some metrics."""

    metrics: Mapping[str, float]
    tensors: tuple[SavedTensor, ...]
    notes: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Baseline:
    """The figures of each target for one device."""

    hardware: str
    torch: str
    targets: Mapping[str, Figures]


@dataclass(frozen=True)
class Change:
    """One metric of one target, before and now. `blame` names what explains a regression."""

    target: str
    metric: str
    before: float
    now: float
    tolerance: float
    regression: bool
    blame: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The change as a share of the baseline; infinite from zero."""
        if self.before:
            return self.now / self.before - 1
        return float("inf") if self.now else 0.0


def save(baseline: Baseline, path: Path) -> None:
    """Write a baseline as JSON, one line a tensor, so that a change can be reviewed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = []
    for name, figures in baseline.targets.items():
        tensors = ",\n".join("    " + json.dumps(list(asdict(t).values())) for t in figures.tensors)
        parts = [f'   "metrics": {json.dumps(dict(figures.metrics))}', f'   "notes": {json.dumps(dict(figures.notes))}']
        parts.append(f'   "tensors": [\n{tensors}\n   ]')
        targets.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    head = {"version": VERSION, "hardware": baseline.hardware, "torch": baseline.torch}
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
    path.write_text("{\n" + ",\n".join([*lines, ' "targets": {\n' + ",\n".join(targets) + "\n }"]) + "\n}\n")


def load(path: Path) -> Baseline:
    """Read a baseline.

    Raises:
        InvalidBaseline: there is none, or it is of another format.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise InvalidBaseline(f"{path} has format {raw['version']!r}; this memo reads {VERSION}. Use --update.")
        targets = {
            name: Figures(
                t["metrics"],
                tuple(SavedTensor(*entry) for entry in t["tensors"]),
                {k: tuple(v) for k, v in t["notes"].items()},
            )
            for name, t in raw["targets"].items()
        }
        return Baseline(raw["hardware"], raw["torch"], targets)
    except FileNotFoundError as error:
        raise InvalidBaseline(f"there is no baseline {path}. Make it with --update, and commit it.") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InvalidBaseline(f"{path} is no baseline ({error!r}). Make it anew with --update.") from error


def tolerances(given: Iterable[str]) -> dict[str, float]:
    """The tolerance of each metric, `NAME=SHARE` changing one, and `SHARE` alone all.

    Raises:
        InvalidOption: neither of these.

    >>> tolerances(["peak=0.05"])["peak"]
    0.05
    """
    found = {name: metric.tolerance for name, metric in METRICS.items()}
    for text in given:
        name, equals, share = text.rpartition("=")
        if equals and name not in METRICS:
            raise InvalidOption("--tolerance", text, f"NAME=SHARE with a name of {', '.join(METRICS)}")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not value >= 0:
            raise InvalidOption("--tolerance", text, "a share of at least 0, such as 0.05, or NAME=0.05")
        found.update({name: value} if equals else dict.fromkeys(METRICS, value))
    return found


def compare(target: str, before: Figures, now: Figures, allowed: Mapping[str, float]) -> list[Change]:
    """Every metric of one target, before and now."""
    changes = []
    for name, metric in METRICS.items():
        old, new = before.metrics.get(name, 0.0), now.metrics[name]
        worse = new < old * (1 - allowed[name]) if metric.higher_is_better else new > old * (1 + allowed[name])
        blame = tuple(_blame(name, before, now))[:BLAMED] if worse else ()
        changes.append(
            Change(
                target=target, metric=name, before=old, now=new, tolerance=allowed[name], regression=worse, blame=blame
            )
        )
    return changes


def _blame(metric: str, before: Figures, now: Figures) -> Iterator[str]:
    known = before.notes.get(metric, ())
    yield from (note for note in now.notes.get(metric, ()) if note not in known)
    fields_of = {
        "peak": ("kept",),
        "host": ("offloaded",),
        "out": ("offloaded",),
        "in": ("offloaded",),
        "flops": ("recomputed",),
        "step": ("recomputed", "offloaded"),
        "unsliceable": ("whole",),
    }.get(metric, ())
    yield from _grown(before.tensors, now.tensors, fields_of)


def _grown(before: Iterable[SavedTensor], now: Iterable[SavedTensor], names: tuple[str, ...]) -> Iterator[str]:
    """Tensors of which more lies in one of the fields `names` than before, those with the most first."""
    old = {t.name: t for t in before}
    grown = []
    for t in now:
        for home in names:
            was = getattr(old[t.name], home) if t.name in old else 0
            more = getattr(t, home) - was
            if more > 0:
                grown.append((-more, t.name, home, was, t))
    for more, name, home, was, t in sorted(grown, key=lambda entry: entry[:3]):
        how = "cannot be sliced" if home == "whole" else home
        new = "" if name in old else ", new"
        yield f"{name}{new}: {was - more:,} bytes {how}, {-more:,} more than before; {t.source}"
