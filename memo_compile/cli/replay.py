"""Run the passes again from a dump, without the model and without its device, and compare each with the dump."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "rerun the passes from a dump and compare"
SHOWN = 20  # differences of one pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's arguments."""
    parser.add_argument("dump", type=Path, metavar="DIR", help="a dump, or the folder of one graph in it")


def run(arguments: argparse.Namespace) -> int:
    """0 where every pass did what the dump says, 1 where one did not."""
    from rich.console import Console  # loads rich
    from rich.markup import escape

    from memo_compile.report.replay import graph_folders, replay  # loads torch

    console = Console(highlight=False)
    differ = False
    for folder in graph_folders(arguments.dump):
        console.print(f"[bold]{escape(folder.name)}[/bold]")
        for done in replay(folder):
            result = "[red]differs[/red]" if done.differences else "[green]same[/green]"
            console.print(f"  {done.name:<10} {done.seconds:8.2f} s  {result:<4}  {escape(done.note)}")
            for text in done.differences[:SHOWN]:
                console.print(f"    {escape(text)}", soft_wrap=True)
            if len(done.differences) > SHOWN:
                console.print(f"    … and {len(done.differences) - SHOWN} more")
            # Another version is worth a line, and no failure.
            differ = differ or (bool(done.differences) and done.name != "read")
    console.print("the plan differs from the dump" if differ else "the plan is the dump's")
    return 1 if differ else 0
