"""The page of the GPU's figures: tables by length with the cards side by side, plots, and what people wrote below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import goals, questions, roster
from bench.agenda import unrun
from bench.common import RESULTS
from bench.rows import PLOTTED, Row, Rows, is_current, longest

GIB = 2**30
REMARKS = "gpu-remarks.md"  # beside the page, by hand; the program copies it below the tables
UNSAID = ("log", "profile", "done")  # what is stored with a part and stands in no line

HEAD = """# Measured on GPUs

Written by `python -m bench.device`, but for the remarks at the end. One sequence, bfloat16, fused AdamW, a loss made in
chunks; every row in a process of its own, compiled cold. Peaks are above parameters and optimizer state. `memo@peer` is
memo within that peer's peak, and × its rate over that peer's. † was made with other code than what lay here when this
page was written: the commit says with which.
"""


def write(rows: Rows, parts: Mapping[str, Row]) -> None:
    """Write the page and its plot beside the rows; `parts` are what else was run, by card and name."""
    page = rows.path.with_suffix(".md")
    picture = rows.path.with_suffix(".png")
    shown = f"![tokens/s against peak, and the longest length by peer]({picture.name})\n" if plotted(rows) else ""
    goal = f"## What it is to show\n\n{goals.table(rows)}\n"
    asked = f"## Open questions\n\n`python -m bench.probes NAME` asks.\n\n{questions.table(parts)}\n"
    chapters = [HEAD, goal, shown, tables(rows), not_run(rows), asked, answers(parts), remarks(page.parent)]
    page.write_text("\n".join(chapter for chapter in chapters if chapter))
    plot(rows, picture)


def remarks(folder: Path) -> str:
    """What people wrote: of this folder, else of the committed results."""
    for place in (folder, RESULTS):
        if (place / REMARKS).exists():
            return (place / REMARKS).read_text()
    return ""


def tables(rows: Rows) -> str:
    """Two tables for each model and length: what was reached on each card, and the rest by card."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows.rows.values():
        groups.setdefault((row["model"], row["layers"], row["tokens"]), []).append(row)
    return "\n".join(
        f"## {model}, {layers} layers, {_tokens(tokens)} tokens\n\n{_reached(found, rows)}\n\n{_details(found)}\n"
        for (model, layers, tokens), found in sorted(groups.items())
    )


def not_run(rows: Rows) -> str:
    """What the agenda has beside the tables' rows, by card and length, and why there is none."""
    lines = []
    for card in rows.cards():
        groups: dict[tuple[str, int, int, str], list[str]] = {}
        for case, why in unrun(rows, card):
            groups.setdefault((case.model, case.layers, case.tokens, why), []).append(case.peer)
        short = card.removeprefix("NVIDIA ")
        for (model, layers, tokens, why), peers in sorted(groups.items()):
            lines.append(f"- {short}, {model}, {layers} layers, {_tokens(tokens)}, {why}: {', '.join(peers)}")
    return "## Not run\n\n" + "\n".join(lines) + "\n" if lines else ""


def answers(parts: Mapping[str, Row]) -> str:
    """The tests, the fuzzer and the probes: what each said, when it was run and with which commit."""
    lines = []
    for name, part in sorted(parts.items()):
        said = {key: value for key, value in part.get("said", {}).items() if key not in UNSAID}
        what = ", ".join(f"{key} {_short(value)}" for key, value in said.items())
        commit = part["commit"] or part["code"]
        lines.append(f"- {name.removeprefix('NVIDIA ')} ({commit}, {part['seconds']:.0f} s): {what}")
    return "## Beside the rows\n\n" + "\n".join(lines) + "\n" if lines else ""


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if not isinstance(value, dict) else f"({', '.join(f'{k} {_short(v)}' for k, v in value.items())})"


def _tokens(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}".replace(",", " ")


def _reached(found: Sequence[Row], rows: Rows) -> str:
    cards = rows.cards()
    short = [card.removeprefix("NVIDIA ") for card in cards]
    columns = [f"{card} {what}" for card in short for what in ("tokens/s", "MFU", "peak GiB")]
    lines = [f"| peer | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    by_peer = {(row["peer"], row["card"]): row for row in found}
    for peer in _in_order(row["peer"] for row in found):
        cells = [cell for card in cards for cell in _three(by_peer.get((peer, card)), by_peer)]
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_order(peers: Iterable[str]) -> list[str]:
    """What one would use instead first, then memo within each one's peak."""
    known = list(roster.ALL)
    return sorted(set(peers), key=lambda p: (roster.is_memo(p), known.index(p) if p in known else len(known), p))


def _three(row: Row | None, by_peer: dict[tuple[str, str], Row]) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    old = "" if is_current(row) else " †"
    if "failed" in row:
        return row["failed"] + old, "", ""
    other = by_peer.get((roster.other_of(row["peer"]), row["card"]), {})
    times = f" ({row['tokens_per_second'] / other['tokens_per_second']:.2f} ×)" if "tokens_per_second" in other else ""
    return f"{row['tokens_per_second']:.0f}{times}{old}", f"{row['mfu']:.1%}", f"{row['peak'] / GIB:.3f}"


def _details(found: Sequence[Row]) -> str:
    lines = [
        "| card | peer | reserved GiB | over allocated | host GiB | compile s | loss | predicted peak "
        "| predicted reserved | predicted time | coverage | torch | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = _in_order(row["peer"] for row in found)
    for row in sorted(found, key=lambda row: (order.index(row["peer"]), row["card"])):
        commit = (row["commit"] or row["code"]) + " †" * (not is_current(row))
        start = [row["card"].removeprefix("NVIDIA "), row["peer"]]
        cells = ["", "", "", "", _why(row), "", "", "", ""] if "failed" in row else _figures(row)
        lines.append(f"| {' | '.join([*start, *cells, row['torch'], commit])} |")
    return "\n".join(lines)


def _why(row: Row) -> str:
    """The first line of what a failure said, as a cell."""
    return " ".join(row["said"].replace("|", "/").splitlines()[:1])[:160]


def _figures(r: Row) -> list[str]:
    return [
        f"{r['reserved'] / GIB:.3f}",
        f"{r['reserved'] / r['allocated']:.2f}",
        f"{r['host_bytes'] / GIB:.3f}",
        f"{r['compile_seconds']:.1f}",
        f"{r['losses'][-1]:.4f}",
        f"{r['predicted_peak'] / r['peak'] - 1:+.2%}" if "predicted_peak" in r else "",
        f"{_reserved(r) / r['reserved'] - 1:+.2%}" if r.get("predicted_reserved") and r["reserved"] else "",
        f"{r['predicted_seconds'] / r['model_seconds'] - 1:+.1%}" if "predicted_seconds" in r else "",
        f"{r['coverage']:.2f}" if "coverage" in r else "",
    ]


def _reserved(row: Row) -> int:
    """What is predicted of all that is reserved: a plan's part, and what the step begins with."""
    return int(row["allocated"] - row["peak"] + row["predicted_reserved"])


def plotted(rows: Rows) -> list[Row]:
    """The rows in the plot."""
    return [r for r in rows.rows.values() if "failed" not in r and (r["model"], r["layers"]) == PLOTTED]


def plot(rows: Rows, path: Path) -> None:
    """Tokens/s against peak at the length with most rows, and the longest length by peer, with matplotlib."""
    measured = plotted(rows)
    try:
        import matplotlib
    except ImportError:
        return
    if not measured:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, length) = pyplot.subplots(1, 2, figsize=(13, 5))
    _plot_speed(speed, measured)
    _plot_longest(length, rows, measured)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_speed(axes: Any, measured: Sequence[Row]) -> None:
    lengths = [r["tokens"] for r in measured]
    tokens = max(sorted(set(lengths)), key=lengths.count)
    for marker, card in zip("os^D", sorted({r["card"] for r in measured}), strict=False):
        mine = [r for r in measured if r["tokens"] == tokens and r["card"] == card]
        axes.scatter([r["peak"] / GIB for r in mine], [r["tokens_per_second"] for r in mine], marker=marker, label=card)
        for r in mine:
            axes.annotate(r["peer"], (r["peak"] / GIB, r["tokens_per_second"]), fontsize="x-small")
    axes.set_title(f"{_tokens(tokens)} tokens")
    axes.set_xlabel("peak GiB above parameters and optimizer state")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _plot_longest(axes: Any, rows: Rows, measured: Sequence[Row]) -> None:
    peers = _in_order(r["peer"] for r in measured)[::-1]
    cards = sorted({r["card"] for r in measured})
    for i, card in enumerate(cards):
        places = [n + 0.8 * (i + 0.5) / len(cards) - 0.4 for n in range(len(peers))]
        lengths = [longest(rows, card, peer)[0] / 1024 for peer in peers]
        axes.barh(places, lengths, height=0.8 / len(cards), label=card)
    axes.set_yticks(range(len(peers)), peers, fontsize="x-small")
    axes.set_title("longest length that was run")
    axes.set_xlabel("K tokens")
    axes.legend(fontsize="small")
