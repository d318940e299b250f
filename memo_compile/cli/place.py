"""Place the buffers of a CSV file (columns id, lower, upper, size) and say how good the placement is.

Exit code 0, or 1 where the asked capacity is not met.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from memo_compile.errors import InvalidOption
from memo_compile.placement import Buffer, Placement, place, read_csv
from memo_compile.placement.picture import svg

HELP = "give the buffers of a CSV file their offsets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `memo place`."""
    parser.add_argument(
        "file", help="CSV with the columns id, lower, upper and size: bytes over the range [lower, upper)"
    )
    parser.add_argument("--capacity", type=int, help="stop at a placement within so many bytes")
    parser.add_argument("--alignment", type=int, default=1, help="bytes of which every offset is a multiple")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds (10 by default)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, with every offset")
    parser.add_argument("--svg", metavar="FILE", help="write a picture of addresses over time")


def run(arguments: argparse.Namespace) -> int:
    """Place, print, draw."""
    buffers = read_csv(arguments.file)
    answer = place(buffers, alignment=arguments.alignment, capacity=arguments.capacity, time_limit=arguments.time_limit)
    if arguments.svg:
        try:
            Path(arguments.svg).write_text(svg(buffers, answer), encoding="utf-8")
        except OSError as error:
            raise InvalidOption("svg", arguments.svg, f"a file that can be written ({error.strerror})") from error
    if arguments.json:
        print(json.dumps(asdict(answer), indent=1))
    else:
        _print_table(buffers, answer, arguments.capacity)
    return 0 if answer.fits else 1


def _print_table(buffers: list[Buffer], answer: Placement, capacity: int | None) -> None:
    from rich.console import Console  # loads rich
    from rich.table import Table

    table = Table(show_header=False, title=f"{len(buffers)} buffers")
    table.add_row("peak", f"{answer.peak:,} bytes")
    table.add_row("lower bound", f"{answer.lower_bound:,} bytes")
    table.add_row("peak / lower bound", f"{answer.peak / max(1, answer.lower_bound):.4f}")
    table.add_row("proved optimal", "yes" if answer.proved_optimal else "no")
    if capacity is not None:
        words = {True: "yes", False: "no, proved", None: "not known"}[answer.fits]
        table.add_row(f"fits in {capacity:,} bytes", f"{words}. {answer.reason}" if answer.reason else words)
    table.add_row("solver", answer.solver)
    table.add_row("seconds", f"{answer.seconds:.2f}")
    Console().print(table)
