"""What the rows are to show: each figure as it is, with its commit, beside what it is to be.

A figure whose rows are missing is not known, and one whose code has changed since is marked, as in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench import roster
from bench.rows import Row, Rows, is_current

GIB = 2**30
K = 1024
STREAMS, TILES = "checkpoint+streams", "checkpoint+streams+tiles"
MOVING = (STREAMS, TILES, "checkpoint+save_on_cpu", "inductor-offload")  # peers that offload or tile
ALST = 1200 / 650  # K tokens of Llama-8B on one H200 with and without a tiled MLP, arXiv 2506.13996


@dataclass(frozen=True)
class Found:
    """One figure: of what, its value, how it is written, and the rows that it is from.

    `bounded` is whether more than these rows were tried, and failed: a longest length is none before.
    """

    what: str
    value: float
    shown: str
    rows: tuple[Row, ...]
    bounded: bool = True


Find = Callable[[Sequence[Row]], Iterator[Found]]


@dataclass(frozen=True)
class Goal:
    """A figure that rows of one card have, and what it is to be."""

    figure: str
    wanted: str
    reached: Callable[[Found], bool]
    find: Find


def table(rows: Rows) -> str:
    """All goals, for every card with rows. † as in the tables."""
    lines = ["| figure | now | goal | reached |", "|---|---|---|---|"]
    for goal in GOALS:
        found = [f for card in rows.cards() for f in goal.find(_of(rows, card))]
        now = "; ".join(_shown(f) for f in found) or "not known"
        lines.append(f"| {goal.figure} | {now} | {goal.wanted} | {verdict(goal, found)} |")
    return "\n".join(lines)


def verdict(goal: Goal, found: Sequence[Found]) -> str:
    """Whether a goal is reached in all that is known."""
    if not all(f.bounded for f in found) or not found:
        return "not known"
    short = [f for f in found if not goal.reached(f)]
    if not short:
        return "as far as it is known"
    return "no" if len(short) == len(found) else f"no, {len(short)} of {len(found)} short"


def _of(rows: Rows, card: str) -> list[Row]:
    return [r for r in rows.rows.values() if r["card"] == card and not r.get("tiny")]


def _ran(find: Find) -> Find:
    """Of rows that have figures."""
    return lambda rows: find([r for r in rows if "failed" not in r])


def _shown(found: Found) -> str:
    card = found.rows[0]["card"].removeprefix("NVIDIA ")
    commits = sorted({(r["commit"] or r["code"]) + " †" * (not is_current(r)) for r in found.rows})
    return f"{found.what}: {found.shown} ({card}, {', '.join(commits)})"


def _length(row: Row) -> str:
    layers = "" if row["layers"] == 4 else f" {row['layers']} layers"
    model = "" if row["model"] == "llama-8b" else f" {row['model']}"
    return f"{row['tokens'] // K}K{model}{layers}"


def _beside(mine: Row, rows: Sequence[Row], peer: str) -> Row | None:
    """The row of another peer at the same length of the same model."""
    same = ("model", "layers", "tokens")
    return next((r for r in rows if r["peer"] == peer and all(r[k] == mine[k] for k in same)), None)


def _pairs(rows: Sequence[Row], mine: Callable[[Row], bool], peer: str) -> Iterator[tuple[Row, Row]]:
    """Rows of ours, by length, each with that of a peer."""
    for row in sorted(filter(mine, rows), key=lambda r: (r["model"], r["layers"], r["tokens"])):
        other = _beside(row, rows, peer)
        if other is not None:
            yield row, other


def _times(wanted: Callable[[Row], bool]) -> Find:
    """Tokens/s over those of each peer that offloads or tiles, within its peak."""

    def find(rows: Sequence[Row]) -> Iterator[Found]:
        for peer in MOVING:
            ours = lambda r, peer=peer: r["peer"] == f"memo@{peer}" and wanted(r)  # noqa: E731
            for mine, other in _pairs(rows, ours, peer):
                times = mine["tokens_per_second"] / other["tokens_per_second"]
                yield Found(f"{_length(mine)}, {peer}", times, f"{times:.2f} ×", (mine, other))

    return find


def _longest(rows: Sequence[Row]) -> Iterator[Found]:
    """The longest length that memo trained over the longest of any peer."""
    tried = [r for r in rows if (r["model"], r["layers"]) == ("llama-8b", 4)]
    sides = [[r for r in tried if roster.is_memo(r["peer"]) == memo] for memo in (True, False)]
    best = [max((r for r in side if "failed" not in r), key=lambda r: r["tokens"], default=None) for side in sides]
    ours, other = best
    if ours is None or other is None:
        return
    ended = any("failed" in r and r["tokens"] > other["tokens"] for r in sides[1])
    times = ours["tokens"] / other["tokens"]
    shown = f"{times:.2f} × ({_length(ours)}, and {_length(other)} by {other['peer']})"
    yield Found("run so far", times, shown, (ours, other), bounded=ended)


def _least_peak(rows: Sequence[Row]) -> Iterator[Found]:
    for row in _named(rows, "memo-min", 64 * K):
        yield Found("64K", row["peak"] / GIB, f"{row['peak'] / GIB:.1f} GiB", (row,))


def _least_time(rows: Sequence[Row]) -> Iterator[Found]:
    for row, other in _pairs(rows, lambda r: r in _named(rows, "memo-min", 64 * K), "inductor"):
        times = row["seconds"] / other["seconds"]
        yield Found("64K", times, f"{times:.2f} ×", (row, other))


def _named(rows: Sequence[Row], peer: str, tokens: int) -> list[Row]:
    wanted = ("llama-8b", 4, tokens, peer)
    return [r for r in rows if (r["model"], r["layers"], r["tokens"], r["peer"]) == wanted]


def _mfu(rows: Sequence[Row]) -> Iterator[Found]:
    long = [r for r in rows if roster.is_memo(r["peer"]) and r["tokens"] >= 256 * K]
    for tokens in sorted({r["tokens"] for r in long}):
        best = max((r for r in long if r["tokens"] == tokens), key=lambda r: r["mfu"])
        yield Found(f"{_length(best)}, {best['peer']}", best["mfu"], f"{best['mfu']:.1%}", (best,))


def _predicted(rows: Sequence[Row]) -> Iterator[Found]:
    for row in sorted((r for r in rows if "predicted_seconds" in r), key=lambda r: (r["tokens"], r["peer"])):
        off = row["predicted_seconds"] / row["model_seconds"] - 1
        yield Found(f"{_length(row)}, {row['peer']}", abs(off), f"{off:+.1%}", (row,))


def _reserved(rows: Sequence[Row]) -> Iterator[Found]:
    for row in _planned(rows):
        times = row["reserved"] / row["allocated"]
        yield Found(f"{_length(row)}, {row['peer']}", times, f"{times:.2f}", (row,))


def _planned(rows: Sequence[Row]) -> list[Row]:
    """Rows with a plan that does something."""
    planned = [r for r in rows if "coverage" in r and (r["planned_out"] or r["recomputed_share"])]
    return sorted(planned, key=lambda r: (r["model"], r["layers"], r["tokens"], r["peer"]))


def _nothing(rows: Sequence[Row]) -> Iterator[Found]:
    idle = [r for r in rows if r["peer"] == "memo-auto" and not r.get("planned_out") and not r.get("recomputed_share")]
    for row, other in _pairs(rows, lambda r: r in idle, "inductor"):
        more = row["seconds"] / other["seconds"] - 1
        kib = (row["peak"] - other["peak"]) / 1024
        yield Found(_length(row), more, f"{more:+.1%} time, {kib:+.0f} KiB", (row, other))


def _compile(rows: Sequence[Row]) -> Iterator[Found]:
    for row, other in _pairs(rows, lambda r: r in _planned(rows), "inductor"):
        times = row["compile_seconds"] / other["compile_seconds"]
        yield Found(f"{_length(row)}, {row['peer']}", times, f"{times:.1f} ×", (row, other))


def _coverage(rows: Sequence[Row]) -> Iterator[Found]:
    for row in _planned(rows):
        yield Found(f"{_length(row)}, {row['peer']}", row["coverage"], f"{row['coverage']:.2f}", (row,))


def _alst(rows: Sequence[Row]) -> Iterator[Found]:
    """What the tiling peer saves over the same without tiles: a check of the peer, not of memo."""
    for row, plain in _pairs(rows, lambda r: r["peer"] == TILES and r["tokens"] >= 128 * K, STREAMS):
        times = plain["peak"] / row["peak"]
        yield Found(_length(row), times, f"{times:.2f} ×", (row, plain))


def _at_least(least: float, tokens: int = 0) -> Callable[[Found], bool]:
    """`tokens` that the first row is to have as well."""
    return lambda found: found.value >= least and found.rows[0]["tokens"] >= tokens


def _at_most(most: float) -> Callable[[Found], bool]:
    return lambda found: found.value <= most


def _is(low: int, high: float) -> Callable[[Any], bool]:
    return lambda row: low <= row["tokens"] < high


GOALS = (
    Goal("tokens/s within the peak of each peer that offloads or tiles, 64K tokens and beyond", "≥ 1.33 ×",
         _at_least(1.33), _ran(_times(_is(64 * K, float("inf"))))),
    Goal("the same at 16K", "≥ 1.25 ×", _at_least(1.25), _ran(_times(_is(16 * K, 64 * K)))),
    Goal("longest length, 4 layers, over the best peer's", "≥ 1.5 ×, and ≥ 1M tokens",
         _at_least(1.5, 1024 * K), _longest),
    Goal('peak at "min", 64K', "≤ 6.5 GiB", _at_most(6.5), _ran(_least_peak)),
    Goal('a step at "min", 64K, over Inductor\'s', "≤ 1.15 ×", _at_most(1.15), _ran(_least_time)),
    Goal("MFU at 256K and beyond", "≥ 52.3 %, the paper's on A800 at 1M", _at_least(0.523), _ran(_mfu)),
    Goal("predicted time of a step", "within 5 %", _at_most(0.05), _ran(_predicted)),
    Goal("reserved over allocated", "≤ 1.03", _at_most(1.03), _ran(_reserved)),
    Goal("a step where there is nothing to do, over Inductor's", "≤ +1 %", _at_most(0.01), _ran(_nothing)),
    Goal("compiling within a budget, cold, over Inductor's", "≤ 1.2 ×", _at_most(1.2), _ran(_compile)),
    Goal("coverage", "≥ 0.95", _at_least(0.95), _ran(_coverage)),
    Goal("the tiling peer's peak below that without tiles, as its authors' lengths", "≥ 1.85 ×",
         _at_least(ALST), _ran(_alst)),
)  # fmt: skip
