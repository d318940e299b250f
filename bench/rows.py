"""Rows by card, model, layers, tokens and peer, in one JSON file that is written after every row.

A row replaces an older one of the same name. It carries its commit and the hash of the code that it depends on, and is
current only while that code lies here.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import roster
from bench.measurement import Case

Row = dict[str, Any]
PLOTTED = ("llama-8b", 4)  # model and layers of which longest lengths are sought
UNSETTLED = ("died", "ImportError", "ModuleNotFoundError")  # failures to be tried again


def write_whole(path: Path, data: object) -> None:
    """Write JSON so that the file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(beside, path)


class Rows:
    """The rows of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.exists() else {}

    def add(self, row: Row) -> None:
        """Store a row at once."""
        self.rows[f"{row['card']}/{_case(row).key}"] = row
        write_whole(self.path, {"rows": self.rows})

    def find(self, card: str, case: Case) -> Row | None:
        """The row of a case on a card, of whatever commit."""
        return self.rows.get(f"{card}/{case.key}")

    def current(self, card: str, case: Case) -> Row | None:
        """The row of a case on a card, if it was made with the code that lies here."""
        row = self.find(card, case)
        return row if row is not None and is_current(row) else None

    def cards(self) -> list[str]:
        """The cards that have rows, in the order of their names."""
        return sorted({row["card"] for row in self.rows.values()})


def parts_beside(path: Path) -> dict[str, Row]:
    """What `bench.device` ran beside rows, by card and name: in `device.json` of the same folder."""
    beside = path.with_name("device.json")
    parts: dict[str, Row] = json.loads(beside.read_text())["parts"] if beside.exists() else {}
    return parts


def _case(row: Row) -> Case:
    return Case(row["model"], row["layers"], row["tokens"], row["peer"])


def is_current(row: Row) -> bool:
    """Whether the code that a row depends on lies here as it was; what tells nothing of the code is never current."""
    return row.get("failed") not in UNSETTLED and row.get("code") == roster.code(row["model"], row["peer"])


class NothingToStandOn(Exception):
    """A row within another peer's peak, where that peer has no figures on this card."""


def within(case: Case, rows: Rows, card: str) -> Case:
    """The case with its budget: the other peer's peak on the same card, where it is to stay within one.

    Raises:
        NothingToStandOn: there is no such peak.
    """
    other = roster.other_of(case.peer)
    if not other:
        return case
    row = rows.find(card, replace(case, peer=other))
    if row is None or "failed" in row:
        raise NothingToStandOn(f"{other}: {row['failed'] if row else 'not measured'}")
    return replace(case, budget=int(row["peak"]))


def longest(rows: Rows, card: str, peer: str) -> tuple[int, int]:
    """The longest length of the plotted model that trained, and the shortest above it that did not; 0 for none."""
    mine = _like(rows, card, Case(*PLOTTED, 0, peer))
    good = max((r["tokens"] for r in mine if "failed" not in r), default=0)
    return good, min((r["tokens"] for r in mine if _too_long(r) and r["tokens"] > good), default=0)


def too_long_at(rows: Rows, card: str, case: Case) -> int:
    """A shorter length at which the peer ended with the code that lies here; 0 for none.

    Within another's peak nothing is known: that one's differs by length.
    """
    if roster.other_of(case.peer):
        return 0
    ended = [r["tokens"] for r in _like(rows, card, case) if _too_long(r) and is_current(r)]
    return min((tokens for tokens in ended if tokens < case.tokens), default=0)


def _like(rows: Rows, card: str, case: Case) -> list[Row]:
    """The rows of one peer and model on a card, of any length."""
    wanted = (card, case.model, case.layers, case.peer)
    return [r for r in rows.rows.values() if (r["card"], r["model"], r["layers"], r["peer"]) == wanted]


def _too_long(row: Row) -> bool:
    """Whether it failed for want of memory, of the device or of the host."""
    return any(word in row.get("failed", "") for word in ("Memory", "Budget"))
