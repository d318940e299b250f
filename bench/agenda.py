"""What a card is asked, in order of worth, and how long each part takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from bench import roster
from bench.measurement import Case
from bench.models import make_model, model_flops
from bench.peers import AT
from bench.rows import PLOTTED, NothingToStandOn, Row, Rows, is_current, longest, too_long_at, within

K = 1024
STREAMS, TILES = "checkpoint+streams", "checkpoint+streams+tiles"
EVERY = (  # what one would use instead, of which each table has a row, and one of memo within its peak
    *("inductor", "inductor-budget-0.5", "checkpoint", STREAMS, TILES, "inductor-offload", "checkpoint+liger"),
)
TABLES = (  # model, layers and lengths of the tables, what is worth most first
    ("llama-8b", 4, (64, 128, 16, 8, 256, 512, 1024)),
    ("gpt-7b", 4, (64, 256)),
    ("llama-8b", 8, (64,)),
    ("hf-llama-8b", 4, (64,)),
    ("hf-llama-8b-lora", 4, (64,)),
    ("hf-qwen3-moe", 4, (32,)),
)
SHORT = 16 * K  # tokens up to which a step is so short that six are timed
LONG = 128 * K  # tokens from which one timed step is enough
UNIT = 8 * K  # of lengths that are tried


@dataclass(frozen=True)
class Item:
    """One part: a row, or by its name the tests, the fuzzer, a probe, or a longer length of a peer."""

    name: str
    case: Case | None = None


def _row(model: str, layers: int, tokens: int, *peers: str) -> Iterator[Item]:
    for peer in peers:
        case = Case(model, layers, tokens, peer, steps=1 if tokens >= LONG else 6 if tokens <= SHORT else 2)
        yield Item(case.key, case)


def _llama(tokens: int, *peers: str) -> Iterator[Item]:
    return _row("llama-8b", 4, tokens, *peers)


def agenda(card: str = "") -> list[Item]:
    """All parts for a card, what is worth most first; a peer stands before memo within its peak."""
    return list(dict.fromkeys([*_worth_most(card), *_whole_tables()]))


def _worth_most(card: str) -> list[Item]:
    long = ("memo-110GiB", "memo-auto") if "H200" in card else ("memo-auto",)
    return [
        Item("tests"),
        Item("fuzz"),
        *_llama(64 * K, STREAMS, f"memo@{STREAMS}", "memo-min"),
        *_llama(8 * K, "inductor", "memo-auto"),
        *_llama(256 * K, *long[:1]),
        Item("probe profile"),
        *_llama(64 * K, "inductor", "memo-auto", TILES, f"memo@{TILES}"),
        *_llama(256 * K, STREAMS, f"memo@{STREAMS}"),
        *_llama(16 * K, STREAMS, f"memo@{STREAMS}", "inductor", TILES, f"memo@{TILES}"),
        *_llama(128 * K, STREAMS, f"memo@{STREAMS}"),
        Item("probe step"),
        *_llama(256 * K, *long[1:], TILES, f"memo@{TILES}"),
        *_llama(512 * K, "memo-auto", TILES, f"memo@{TILES}"),
        *_llama(1024 * K, "memo-auto", TILES),
        *_row("hf-llama-8b", 4, 64 * K, STREAMS, f"memo@{STREAMS}"),
        *_row("hf-llama-8b-lora", 4, 64 * K, STREAMS, f"memo@{STREAMS}"),
        Item("probe graphs"),
        Item("probe dropout"),
        Item("probe prefetch_buffers"),
        Item("probe lengths"),
        *_row("llama-8b", 8, 64 * K, STREAMS, f"memo@{STREAMS}", "memo-auto"),
        *_row("gpt-7b", 4, 64 * K, "inductor", STREAMS, f"memo@{STREAMS}", "memo-auto"),
        *_row("gpt-7b", 4, 256 * K, STREAMS, f"memo@{STREAMS}"),
        *_row("hf-qwen3-moe", 4, 32 * K, STREAMS, f"memo@{STREAMS}", "inductor"),
        *_llama(64 * K, "inductor-budget-0.5", "memo@inductor-budget-0.5", "checkpoint", "memo@checkpoint"),
        *_llama(64 * K, "checkpoint+liger", "memo@checkpoint+liger", "inductor-offload", "memo@inductor-offload"),
        *_llama(8 * K, STREAMS, f"memo@{STREAMS}", "checkpoint", "memo@checkpoint", "memo-min"),
        *_llama(16 * K, "memo-auto", "memo-min"),
        *_llama(128 * K, TILES, f"memo@{TILES}", "memo-auto", "memo-min"),
        Item(f"longest {TILES} 1"),
        Item("longest memo-auto 1"),
        Item(f"longest {TILES} 2"),
        Item("longest memo-auto 2"),
        *_row("hf-llama-8b", 4, 64 * K, "inductor", "memo-auto", "memo-min", TILES, f"memo@{TILES}"),
        *_row("hf-llama-8b-lora", 4, 64 * K, "inductor", "memo-auto", "memo-min", TILES, f"memo@{TILES}"),
        *_row("hf-qwen3-moe", 4, 32 * K, "memo-auto", "memo-min"),
        *_row("gpt-7b", 4, 64 * K, TILES, f"memo@{TILES}", "memo-min"),
        *_row("gpt-7b", 4, 256 * K, TILES, f"memo@{TILES}", "memo-auto", "memo-min"),
        *_row("llama-8b", 8, 64 * K, "inductor", TILES, f"memo@{TILES}", "memo-min"),
        *_llama(256 * K, "memo-min"),
        *_llama(512 * K, STREAMS, f"memo@{STREAMS}", "memo-min"),
        *_llama(1024 * K, f"memo@{TILES}", STREAMS, f"memo@{STREAMS}"),
        *_llama(8 * K, TILES, f"memo@{TILES}", "inductor-budget-0.5", "memo@inductor-budget-0.5"),
        Item("probe pinned"),
        Item("probe link"),
        Item("probe locking"),
        Item("probe pieces"),
        Item("probe pins"),
    ]


def _whole_tables() -> Iterator[Item]:
    """Every peer at every length."""
    pairs = [peer for other in EVERY for peer in (other, f"{AT}{other}")]
    for model, layers, lengths in TABLES:
        for tokens in lengths:
            yield from _row(model, layers, tokens * K, *pairs, "memo-min", "memo-auto")


def in_small(item: Item) -> Item:
    """The same for a test of the program itself, on a CPU."""
    if item.case is None:
        return item
    case = replace(item.case, layers=1, tokens=128, tiny=True, device="cpu", steps=1)
    return Item(case.key, case)


def resolved(item: Item, rows: Rows, card: str) -> Case | None:
    """The row that an item asks for; None for what is no row, and for a peer whose longest length is known enough."""
    if not item.name.startswith("longest "):
        return item.case
    peer = item.name.split()[1]
    good, bad = longest(rows, card, peer)
    tokens = (good + bad) // 2 // UNIT * UNIT if bad else 2 * good
    if tokens <= good or (bad and bad - good <= good // 8):
        return None
    return Case(*PLOTTED, tokens, peer, steps=1)


def state(item: Item, rows: Rows, parts: dict[str, Row], card: str) -> str:
    """What is known of it: "current", "older" than the code, "missing", or "other card" where only that one has it."""
    case = resolved(item, rows, card)
    if case is None:
        part = parts.get(f"{card}/{item.name}")
        if item.name.startswith("longest "):
            return "current" if longest(rows, card, item.name.split()[1])[0] else "missing"
        current = part is not None and part["finished"] and part["code"] == roster.part_code()
        return "current" if current else "older" if part else "missing"
    row = rows.find(card, case)
    if row is not None:
        return "current" if is_current(row) else "older"
    return "other card" if any(rows.current(other, case) for other in rows.cards()) else "missing"


def why_not(case: Case, rows: Rows, card: str) -> str:
    """Why a row cannot be measured; "" where it can."""
    ended = too_long_at(rows, card, case)
    if ended:
        return f"does not fit: ended at {ended // K}K tokens"
    try:
        within(case, rows, card)
    except NothingToStandOn as error:
        return str(error)
    return ""


def unrun(rows: Rows, card: str) -> list[tuple[Case, str]]:
    """The rows of the agenda that a card does not have, each with the reason."""
    tiny = any(row.get("tiny") for row in rows.rows.values() if row["card"] == card)
    items = [in_small(item) if tiny else item for item in agenda(card)]
    cases = [item.case for item in dict.fromkeys(items) if item.case is not None]
    return [(case, _reason(case, rows, card)) for case in cases if rows.find(card, case) is None]


def _reason(case: Case, rows: Rows, card: str) -> str:
    other = roster.other_of(case.peer)
    waits = bool(other) and rows.find(card, replace(case, peer=other)) is None
    return (not waits and why_not(case, rows, card)) or "not yet"


TESTS_LAST = 120.0  # seconds at a time; what has not passed by then goes on next time
PARTS = {"tests": TESTS_LAST, "fuzz": 60.0, "probe profile": 45.0, "probe step": 100.0, "probe graphs": 60.0}
PARTS |= {"probe pinned": 70.0}
PART = 30.0  # seconds of a probe that is not named
START, COLD_EAGER, COLD, COLD_BUDGET = 6.0, 2.0, (16.0, 1.5), (20.0, 10.0)  # seconds, and seconds a layer
REACHED = 0.42e15  # FLOP/s of a step; attention and matmuls, as in rows of an H200


def expected(item: Item, rows: Rows, parts: dict[str, Row], card: str) -> float:
    """Seconds that it will take: as long as last time on this card, else on another, else by a formula."""
    case = resolved(item, rows, card)
    if case is None:
        part = parts.get(f"{card}/{item.name}", {})
        seconds = float(part["seconds"]) if part.get("finished") else PARTS.get(item.name, PART)
        return min(seconds, TESTS_LAST) if item.name == "tests" else seconds
    known = [row for c in (card, *rows.cards()) if (row := rows.find(c, case)) is not None]
    if known and (seconds := took(known[0])) is not None:
        return seconds
    return START + _compiling(case) + (1 + case.steps) * _step(case)


def took(row: Row) -> float | None:
    """Seconds that a row took; of old ones, which do not say, what its steps took and a start."""
    if "wall_seconds" in row:
        return float(row["wall_seconds"])
    if "first_step_seconds" in row:
        return START + float(row["first_step_seconds"]) + row["steps"] * float(row["seconds"])
    return None


def _compiling(case: Case) -> float:
    if case.peer.startswith(("checkpoint", "eager")):
        return COLD_EAGER
    tight = roster.is_memo(case.peer) and (case.peer != "memo-auto" or case.tokens > 64 * K)
    once, a_layer = COLD_BUDGET if tight else COLD
    return once + a_layer * case.layers


def _step(case: Case) -> float:
    recomputed = 4 / 3 if case.peer.startswith("checkpoint") else 1.0
    return recomputed * _flops(case.model, case.layers, case.tokens, case.tiny) / REACHED


@cache
def _flops(model: str, layers: int, tokens: int, tiny: bool) -> float:
    try:
        return model_flops(make_model(model, layers, tokens, "meta", tiny), tokens)
    except ImportError:  # the row will say so
        return 0.0
