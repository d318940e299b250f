"""Reads placement problems from CSV files with the columns id, lower, upper, size."""

from __future__ import annotations

import csv
from pathlib import Path

from memo_compile.errors import InvalidBuffer
from memo_compile.placement.problem import Buffer

COLUMNS = ("id", "lower", "upper", "size")


def read_csv(path: str | Path) -> list[Buffer]:
    """Buffers of a CSV file: `size` bytes over the half-open range [lower, upper).

    Raises:
        InvalidBuffer: the file cannot be read, a column is missing or a field is no number; the message names file and
            line.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
            if missing:
                raise InvalidBuffer(f"{path}: has no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
            return [_buffer(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidBuffer(f"{path}: cannot be read as CSV: {error}") from error


def _buffer(path: str | Path, line: int, row: dict[str, str]) -> Buffer:
    if not row["id"] or None in row:  # what is beyond the last column stands under None
        raise InvalidBuffer(f"{path}:{line}: needs an id, and a field for each column: {row}")
    try:
        return Buffer(row["id"], int(row["size"]), int(row["lower"]), int(row["upper"]))
    except (TypeError, ValueError) as error:
        raise InvalidBuffer(f"{path}:{line}: needs id, lower, upper and size as whole numbers: {row}") from error
