"""The layer table: saved activations of one kind, one row, however many layers there are."""

from __future__ import annotations

import io
from collections import defaultdict

from memo_compile.logs import MIB
from memo_compile.schema import ActivationPlan, Plan


def layer_table(plan: Plan, width: int = 160) -> str:
    """Saved activations by the source line that makes them, the largest first, with the share of bytes in each home."""
    from rich.console import Console  # loads rich
    from rich.table import Table

    table = Table(title=f"{plan.name}: saved activations")
    for column in ("source", "op", "shape", "count", "MiB", "kept", "offloaded", "recomputed"):
        table.add_column(column, justify="left" if column in ("source", "op", "shape") else "right", overflow="fold")
    for group in _groups(plan):
        total = sum(a.bytes for a in group)
        shares = (sum(a.share(rows) for a, rows in zip(group, homes, strict=True)) / total for homes in _homes(group))
        first = group[0]
        table.add_row(
            first.source,
            first.name,
            str(list(first.shape)),
            str(len(group)),
            f"{total / MIB:.2f}",
            *(f"{share:.0%}" for share in shares),
        )
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def _groups(plan: Plan) -> list[list[ActivationPlan]]:
    groups: dict[tuple[str, tuple[int, ...], str], list[ActivationPlan]] = defaultdict(list)
    for a in plan.activations:
        groups[a.source, a.shape, a.dtype].append(a)
    return sorted(groups.values(), key=lambda group: -sum(a.bytes for a in group))


def _homes(group: list[ActivationPlan]) -> tuple[list[int], list[int], list[int]]:
    return [a.kept for a in group], [a.offloaded for a in group], [a.recomputed for a in group]
