"""What a run found, as Markdown."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

MEANINGS = {
    "right": "as eager in float64, the same with poison",
    "refused": "memo refuses the program at every budget that was tried, with an error that says why",
    "torch": "memo fails, and stock torch (`inductor`, `aot_eager`) fails likewise",
    "invalid": "eager mode itself fails, or gives what is no number",
    "wrong": "differs from eager",
    "poison": "right, and differs with poison",
    "error": "an error that is no refusal",
    "order": "a smaller budget holds more",
    "budget": "an accepted budget is exceeded",
    "crash": "the process ended",
    "hang": "no answer in time",
}


def rows(path: Path) -> list[Row]:
    """The verdicts in a file, a JSON object a line; a line that was cut off half-way is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with a mark where something is not committed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" and changes" if changed.strip() else "")


def versions() -> str:
    """What programs ran with."""
    import torch

    import memo_compile

    return f"python {platform.python_version()}, torch {torch.__version__}, memo {memo_compile.__version__}"


def section(backend: str, seed: str, found: Sequence[Row]) -> str:
    """One backend's figures."""
    statuses = Counter(r["status"] for r in found)
    refusals = Counter(name for r in found for name in r["refusals"])
    commits = sorted({r["commit"] for r in found})
    seconds = sum(r["seconds"] for r in found)
    lines = [
        f"## {backend}",
        "",
        f"seed {seed}, {len(found)} programs, {seconds / 3600:.1f} hours of one job, commits {', '.join(commits)}",
        "",
        "| | programs | |",
        "|---|---|---|",
        *(f"| {name} | {statuses[name]} | {meaning} |" for name, meaning in MEANINGS.items() if statuses[name]),
        "",
    ]
    if refusals:
        named = ", ".join(f"{name} {count}" for name, count in refusals.most_common())
        lines += [f"Refusals on the way, some of them at the first of several budgets: {named}.", ""]
    for r in found:
        if r["status"] in ("wrong", "poison", "error", "order", "budget", "crash", "hang"):
            lines.append(f"- {r['number']}: {r['status']}: {_short(r['detail'])}")
    theirs = Counter(_short(r["detail"].split("stock: ")[-1]) for r in found if r["status"] == "torch")
    lines += [f"- torch's, {count} times: {what}" for what, count in theirs.most_common(12)]
    return "\n".join(lines).rstrip() + "\n"


def _short(text: str) -> str:
    return " ".join(text.split())[:160]
