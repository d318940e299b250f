"""Makes a failing program smaller as long as it fails in the same way, and stores it where pytest collects it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from bench.fuzzing.oracle import Verdict
from bench.fuzzing.programs import Program, smaller

CASES = Path(__file__).parents[2] / "tests" / "fuzz_cases"


def reduced(
    program: Program, verdict: Verdict, judge: Callable[[Program], Verdict], seconds: float
) -> tuple[Program, Verdict]:
    """The smallest program found in that time that fails as `verdict` says, with its own verdict."""
    until = time.monotonic() + seconds
    tried: set[str] = set()
    found = True
    while found:
        found = False
        for candidate in smaller(program):
            key = candidate.to_json()
            if key in tried:
                continue
            tried.add(key)
            if time.monotonic() > until:
                return program, verdict
            again = judge(candidate)
            if alike(again, verdict):
                program, verdict, found = candidate, again, True
                break
    return program, verdict


def alike(one: Verdict, other: Verdict) -> bool:
    """Whether two failures are of one sort: the same status, and of errors the same class."""
    if one.status != other.status:
        return False
    return one.status != "error" or one.detail.split(":")[0] == other.detail.split(":")[0]


def store(program: Program, verdict: Verdict, backend: str, ladder: bool, folder: Path = CASES) -> Path:
    """Write a failing program as a case: a test that it is right, and what was seen."""
    text = program.to_json()
    name = f"{verdict.status}-{hashlib.sha256((backend + text).encode()).hexdigest()[:8]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    case = {"backend": backend, "ladder": ladder, "seen": f"{verdict.status}: {verdict.detail}"}
    path = folder / name
    path.write_text(json.dumps({**case, "program": json.loads(text)}, indent=1) + "\n")
    return path
