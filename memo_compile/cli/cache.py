"""List, check or clear the plans that are kept for the next process, in torch's cache and beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from memo_compile.logs import MIB

if TYPE_CHECKING:
    from rich.console import Console

    from memo_compile.codegen.caching.entries import Entry

HELP = "list, check or clear the plans in torch's cache"
KEY_SHOWN = 16  # characters of a key, which has 53 or 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's arguments."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=("list", "check", "clear"),
        default="list",
        help="list all entries (the default), check that each is whole (exit code 1 where one is not), or delete all",
    )


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where a check finds an entry that is of no use."""
    from rich.console import Console  # loads rich

    from memo_compile.codegen.caching.entries import delete, entries  # loads torch
    from memo_compile.codegen.caching.plans import torchs_folder

    console, found = Console(highlight=False), list(entries())
    if arguments.what == "clear":
        for entry in found:
            delete(entry.path)
        console.print(f"{len(found)} plans deleted", soft_wrap=True)
        return 0
    console.print(f"{len(found)} plans in {torchs_folder()}", soft_wrap=True)
    if arguments.what == "list":
        _show(console, found)
        return 0
    faulty = [entry for entry in found if entry.fault]
    for entry in faulty:
        console.print(f"{entry.path}: {entry.fault}", soft_wrap=True, markup=False)
    console.print(f"{len(faulty)} of them are of no use: they are made anew when they are asked for")
    return 1 if faulty else 0


def _show(console: Console, found: Sequence[Entry]) -> None:
    from rich.table import Table  # loads rich

    table = Table("key", "written", "MiB", "budget MiB", "peak MiB", "unplanned MiB", box=None)
    for entry in found:
        when = datetime.fromtimestamp(entry.written).strftime("%Y-%m-%d %H:%M")
        plan, row = entry.plan, (entry.key[:KEY_SHOWN], when, f"{entry.size / MIB:.1f}")
        if plan is None:
            table.add_row(*row, entry.fault)
            continue
        budget = "unlimited" if plan.budget is None else f"{plan.budget / MIB:.1f}"
        table.add_row(*row, budget, f"{plan.predicted_peak / MIB:.1f}", f"{plan.unplanned_peak / MIB:.1f}")
    console.print(table)
