"""HiGHS, without its banner."""

from __future__ import annotations

from functools import cache
from typing import Any

from memo_compile.quiet import STDOUT, nowhere


def quiet_highs(time_limit: float) -> Any:
    """A solver that prints nothing, uses one thread and a fixed seed, and stops after `time_limit` seconds."""
    import highspy  # loads HiGHS

    _print_banner_nowhere()
    highs = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "random_seed": 0, "time_limit": float(time_limit)}
    for option, value in options.items():
        highs.setOptionValue(option, value)
    return highs


@cache
def _print_banner_nowhere() -> None:
    """The first solver of a process writes a banner to the C library's stdout, before any option can be set."""
    import highspy  # loads HiGHS

    with nowhere(STDOUT):
        highspy.Highs()
