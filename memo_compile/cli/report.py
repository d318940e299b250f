"""Turn a dump into one HTML file that opens offline: memory over time, the arena, the streams, tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from memo_compile.report.units import human

HELP = "turn a dump into an HTML report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's arguments."""
    parser.add_argument("dump", type=Path, metavar="DIR", help="a dump, or the folder of one graph in it")
    parser.add_argument("--out", type=Path, help="the file to write; DIR/report.html if not given")


def run(arguments: argparse.Namespace) -> int:
    """Write the report, and say where."""
    from memo_compile.report.page import page, read_reports  # loads torch

    out: Path = arguments.out or arguments.dump / "report.html"
    text = page(read_reports(arguments.dump))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{out} ({human(out.stat().st_size)})")
    return 0
