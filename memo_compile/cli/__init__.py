"""The `memo` command: one module here for each subcommand.

A subcommand's module has `HELP`, `add_arguments(parser)` and `run(arguments) -> exit code`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from memo_compile import __version__
from memo_compile.errors import memo_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Mistakes of the user end in one message on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="memo", description="A memory-planning torch.compile backend.")
    parser.add_argument("--version", action="version", version=__version__)
    subcommands = parser.add_subparsers(dest="command", required=True)
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    for name, module in modules.items():
        sub = subcommands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
    arguments = parser.parse_args(argv)
    try:
        return int(modules[arguments.command].run(arguments))
    except Exception as error:
        mistake = memo_error(error)
        if mistake is None:
            raise
        print(f"memo {arguments.command}: {mistake}", file=sys.stderr)
        return 2
