"""How changes against a baseline are shown: as a table, as annotations of GitHub, as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from memo_compile.regression.baseline import METRICS, Change

UNITS = {"": 1.0, "MiB": 2.0**20, "MFLOP": 1e6, "ms": 1e-3}


def in_words(change: Change) -> str:
    """One line: the metric, before and now.

    >>> in_words(Change("llama", "peak", 2**20, 2**21, 0.01, True))
    'peak 1 MiB -> 2 MiB (+100.0%, 0.01 allowed)'
    """
    label = METRICS[change.metric].label
    return (
        f"{label} {_number(change, change.before)} -> {_number(change, change.now)} "
        f"({_share(change)}, {change.tolerance:.3g} allowed)"
    )


def _share(change: Change) -> str:
    return "from 0" if change.share == float("inf") else f"{change.share:+.1%}"


def _number(change: Change, value: float) -> str:
    unit = METRICS[change.metric].unit
    return f"{value / UNITS[unit]:,.6g} {unit}".strip()


def text(changes: Sequence[Change], *, width: int = 120) -> str:
    """A table of what changed, and below it what each regression comes from. Planning noise is left out."""
    from rich.console import Console  # loads rich
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    shown = [c for c in changes if c.regression or (c.now != c.before and c.metric != "planning")]
    targets = len({c.target for c in changes})
    if not shown:
        return f"{targets} target{'s' if targets != 1 else ''}: nothing changed\n"
    table = Table()
    for column in ("target", "", "before", "now", "change", ""):
        table.add_column(column, justify="right" if column in ("before", "now", "change") else "left", overflow="fold")
    for c in shown:
        verdict = f"REGRESSION, {c.tolerance:.3g} allowed" if c.regression else ""
        table.add_row(*(c.target, METRICS[c.metric].label, _number(c, c.before), _number(c, c.now), _share(c), verdict))
    console.print(table)
    if any(c.metric == "step" for c in shown):
        console.print("predicted step: by the profile's rates, not calibrated if it is built in", markup=False)
    for c in shown:
        if c.blame:
            console.print(f"{c.target}: {METRICS[c.metric].label}, behind it:", markup=False)
            for line in c.blame:
                console.print(f"  {line}", markup=False, soft_wrap=True)
    result: str = console.file.getvalue()  # type: ignore[attr-defined]
    return result


def github(changes: Sequence[Change], places: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    """One workflow command for each regression, at the function that makes the target.

    After GitHub's "Workflow commands for GitHub Actions": `%`, line ends, and in properties `:` and `,` are escaped.
    """
    for c in changes:
        if c.regression:
            file, line = places[c.target]
            title = _escaped(f"memo check: {c.target}", property=True)
            message = _escaped("\n".join([in_words(c), *c.blame]))
            yield f"::error file={_escaped(file, property=True)},line={line},title={title}::{message}"


def _escaped(value: str, *, property: bool = False) -> str:
    value = value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return value.replace(":", "%3A").replace(",", "%2C") if property else value


def as_json(changes: Sequence[Change]) -> str:
    """All changes, regressions or not."""
    rows: list[dict[str, Any]] = [
        {**asdict(c), "change": None if c.share == float("inf") else c.share} for c in changes
    ]
    return json.dumps(rows, indent=1)
