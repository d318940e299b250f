"""The layer table: saved activations of one kind, one row, however many layers there are."""

from __future__ import annotations

import io

from memo_compile.logs import MIB
from memo_compile.report.groups import by_source, shares
from memo_compile.schema import Plan


def layer_table(plan: Plan, width: int = 160) -> str:
    """Saved activations by the source line that makes them, the largest first, with the share of bytes in each home."""
    from rich.console import Console  # loads rich
    from rich.table import Table

    table = Table(title=f"{plan.name}: saved activations")
    for column in ("source", "op", "shape", "count", "MiB", "kept", "offloaded", "recomputed"):
        table.add_column(column, justify="left" if column in ("source", "op", "shape") else "right", overflow="fold")
    for group in sorted(by_source(plan), key=lambda group: -sum(a.bytes for a in group)):
        first = group[0]
        table.add_row(
            first.source,
            first.name,
            str(list(first.shape)),
            str(len(group)),
            f"{sum(a.bytes for a in group) / MIB:.2f}",
            *(f"{share:.0%}" for share in shares(group)),
        )
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text
