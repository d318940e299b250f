"""Plan training steps for a named device, without a GPU, and fail where they regress against a committed baseline.

A target is a function without arguments that returns (model, args), (model, args, kwargs) or (model, args, kwargs,
options). It is called with fake tensors: nothing is allocated, however large the model.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from memo_compile.regression.baseline import tolerances
from memo_compile.regression.changes import as_json, github, text
from memo_compile.regression.check import check, location
from memo_compile.trace.targets import load_target

HELP = "plan models without a GPU, and exit 1 where memory or time regress against a baseline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("targets", nargs="+", metavar="package.module:function", help="what makes a model and inputs")
    parser.add_argument("--baseline", type=Path, required=True, help="the JSON file that is committed")
    parser.add_argument("--hardware", help="profile to plan for (the baseline's): a name such as h100, or a file")
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument(
        "--format", choices=("table", "github", "json"), default="table", help="github: annotations beside the table"
    )
    parser.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="[NAME=]SHARE",
        help="by how much a figure may worsen, as a share of the baseline: peak=0.05, or 0.05 for all",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare or update; 1 where anything regressed."""
    targets = {name: load_target(name) for name in arguments.targets}
    changes = check(
        targets,
        arguments.baseline,
        tolerances(arguments.tolerance),
        hardware=arguments.hardware,
        update=arguments.update,
    )
    if arguments.update:
        print(f"{arguments.baseline}: {len(targets)} target{'s' if len(targets) != 1 else ''} written")
        return 0
    if arguments.format == "json":
        print(as_json(changes))
    else:
        print(text(changes, width=shutil.get_terminal_size((120, 24)).columns), end="")
    if arguments.format == "github":
        for line in github(changes, {name: location(name) for name in targets}):
            print(line)
    return int(any(c.regression for c in changes))
