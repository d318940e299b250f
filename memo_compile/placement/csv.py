"""Reads placement problems from CSV files with the columns id, lower, upper, size."""

from __future__ import annotations

import csv
from pathlib import Path

from memo_compile.errors import InvalidBuffer
from memo_compile.placement.problem import Buffer


def read_csv(path: str | Path) -> list[Buffer]:
    """Buffers of a CSV file: `size` bytes over the half-open range [lower, upper).

    Raises:
        InvalidBuffer: a column is missing or a field is no number; the message names file and line.
    """
    buffers = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                buffers.append(Buffer(row["id"], int(row["size"]), int(row["lower"]), int(row["upper"])))
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidBuffer(f"{path}:{line}: needs id, lower, upper and size as numbers: {row}") from error
    return buffers
