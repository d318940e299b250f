"""Every peer by its name, and the code that each depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.models import given_to_memo
from bench.peers import AT, PEERS, Run, memo
from bench.provenance import code_of
from bench.tiled import alst, liger

MEMO = "memo-"  # memo within a budget of its own: `memo-auto`, `memo-0.5`, `memo-110GiB`
MODEL_FILES = {"llama-8b": "memo_compile/models/llama.py", "gpt-7b": "memo_compile/models/gpt.py"}
TILED: dict[str, Callable[[Any], Run]] = {"checkpoint+streams+tiles": alst, "checkpoint+liger": liger}
ALL: dict[str, Callable[[Any], Run]] = {**PEERS, **TILED}


def is_memo(peer: str) -> bool:
    """Whether it is memo, and not what one would use instead."""
    return peer.startswith((MEMO, AT))


def other_of(peer: str) -> str:
    """The peer within whose peak memo is to stay; "" where it has a budget of its own."""
    return peer.removeprefix(AT) if peer.startswith(AT) else ""


def is_known(peer: str) -> bool:
    """Whether there is such a peer."""
    return other_of(peer) in ALL if peer.startswith(AT) else peer in ALL or (len(peer) > len(MEMO) and is_memo(peer))


def make(peer: str, budget: int) -> Callable[[Any], Run]:
    """What makes a step's forward of a model; `budget` in bytes, for memo within another's peak."""
    return (lambda trained: _memo(peer, budget)(given_to_memo(trained))) if is_memo(peer) else ALL[peer]


def _memo(peer: str, budget: int) -> Callable[[Any], Run]:
    if peer.startswith(AT):
        return memo(memory_budget=budget)
    if peer in ALL:
        return ALL[peer]
    asked = peer.removeprefix(MEMO)
    return memo(memory_budget=float(asked) if asked.replace(".", "", 1).isdigit() else asked)


def sources(model: str, peer: str) -> tuple[str, ...]:
    """The files and folders that a figure of this peer and model depends on."""
    tiled = ("bench/tiled.py",) if peer in TILED else ()
    models = (MODEL_FILES.get(model, "bench/models.py"),)
    package = ("memo_compile",) if is_memo(peer) else ()
    return ("bench/peers.py", *models, *package, *tiled)


def code(model: str, peer: str) -> str:
    """The code of such a figure as it lies here now."""
    return code_of(sources(model, peer))


def part_code() -> str:
    """The code of what is run beside rows: tests, fuzzer and probes."""
    return code_of(("memo_compile", "tests/gpu", "bench/probes"))
