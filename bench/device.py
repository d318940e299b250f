"""All that a CUDA card is asked, in order of worth, within a given time: tests, fuzzer, rows, probes.

    python -m bench.device --minutes N [--dry] [--out DIR] [--parts tests fuzz rows probes] [--only PATTERN …]

Runs from a checkout, installed or not, and needs no network. Packages: torch with triton, highspy, networkx, numpy,
rich, pytest, pytest-xdist, hypothesis; where they are there also transformers, peft, liger-kernel (rows of their
models), matplotlib (plots).

1. `pytest tests/gpu`, shared out over workers, for two minutes; what has not passed by then goes on next time.
2. `bench.fuzz` on the card. 3. Rows: those that are missing or older than the code first, then those that another card
has. 4. Probes: questions with a figure for an answer. In what order these take turns is `bench/agenda.py`'s. What is
not expected to end in time is not begun; what does not is ended, and begun again next time. Each row and each answer is
stored at once, with card, versions, commit and the hash of the code that it depends on, and a second run goes on where
the first stopped.

DIR gets gpu.json (rows), device.json (the rest), gpu.md and gpu.png (the page), tests.log and fuzz.log; rows and
answers that are committed but not in DIR are taken over. `--dry` says what would be run and how long it took last time.
`--tiny` shrinks every size and runs on the CPU, to test the program itself.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bench import pages, roster
from bench.agenda import TESTS_LAST, Item, agenda, expected, in_small, resolved, state, took, why_not
from bench.common import RESULTS, ROOT, child_environment
from bench.fuzzing.oracle import FAILURES
from bench.provenance import card, made
from bench.rows import Row, Rows, parts_beside, too_long_at, write_whole
from bench.worker import Runner, end

KINDS = ("tests", "fuzz", "rows", "probes")
WORKERS = 12
FUZZED = ("memo_eager", "memo")  # backends
FUZZ_MINUTES, FUZZ_JOBS, FUZZ_LAST = 0.6, 7, 20.0  # seconds for what has begun by then
SPARE = 8.0  # seconds at the end, for the page
HOW = "PASSED|FAILED|ERROR|SKIPPED"
NOTHING_LEFT = 5  # pytest's exit status where it ran no test
TAIL = 3000  # characters of a log that are stored with its part


def kind(item: Item) -> str:
    """Which part of the agenda it is of."""
    if item.name in KINDS:
        return item.name
    return "probes" if item.name.startswith("probe ") else "rows"


@dataclass(frozen=True)
class Ran:
    """What a command said: `code` is None where it was ended."""

    code: int | None
    text: str


def run_within(command: Sequence[str], seconds: float, more: Mapping[str, str] = MappingProxyType({})) -> Ran:
    """Run a command of this checkout, and end it and all it started when its time is over.

    `more` is for its environment.
    """
    environment = {**child_environment(), **more}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, seconds))
        code = process.poll()
        end(process)
        log.seek(0)
        return Ran(code, log.read())


def tests(seconds: float, before: Row | None) -> tuple[bool, Row, str]:
    """Whether `tests/gpu` ran to its end, how each test did, and the log.

    `before` is what a run of the same code said that was ended: what passed then is not run again.
    """
    many = ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"] if find_spec("xdist") else []
    done = (before or {}).get("done", [])
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "-p", "no:cacheprovider", *many]
    ran = run_within(command, min(seconds, TESTS_LAST), {"MEMO_TESTS_DONE": "\n".join(done)})
    said = outcomes(ran.text)
    said["passed"] += len(done)
    said["done"] = sorted({*said["done"], *done})
    if ran.code != 0:
        said["log"] = ran.text[-TAIL:]
    return ran.code in (0, 1) or (ran.code == NOTHING_LEFT and bool(done)), said, ran.text


def outcomes(log: str) -> Row:
    """How many tests passed, failed and so on, and which did what: from pytest's lines, one a test, also cut off."""
    shared = re.findall(rf"^\[gw\d+\].*?({HOW}) (tests/\S+)", log, re.MULTILINE)
    alone = [(how, name) for name, how in re.findall(rf"^(tests/\S+) ({HOW})", log, re.MULTILINE)]
    found = shared + alone
    said: Row = {how.lower(): sum(h == how for h, _ in found) for how in HOW.split("|")}
    said["wrong"] = sorted({name for how, name in found if how in ("FAILED", "ERROR")})
    said["done"] = sorted({name for how, name in found if how == "PASSED"} - set(said["wrong"]))
    return said


def fuzz(seconds: float, device: str) -> tuple[bool, Row, str]:
    """Whether the fuzzer judged any program, what it found, and its log.

    Both backends run side by side: op by op, which judges many programs, and compiled, which judges few. Each commit
    draws its own programs, by `seed`.
    """
    minutes, seed = min(FUZZ_MINUTES, seconds / 60), roster.part_code()
    limit = min(seconds, 60 * minutes + FUZZ_LAST)
    many = ["--cases", "100000", "--jobs", str(min(FUZZ_JOBS, os.cpu_count() or 1)), "--no-reduction"]
    common = ["--device", device, "--minutes", f"{minutes:.2f}", "--seed", seed, *many]
    with tempfile.TemporaryDirectory(prefix="memo-fuzz-") as runs, ThreadPoolExecutor(len(FUZZED)) as pool:

        def one(backend: str) -> Ran:
            return run_within(
                [sys.executable, "-m", "bench.fuzz", "--backend", backend, *common, "--runs", runs], limit
            )

        logs = [ran.text for ran in pool.map(one, FUZZED)]
        said = {backend: verdicts(Path(runs), backend) for backend in FUZZED}
    text = "\n".join(logs)
    judged = sum(found["programs"] for found in said.values())
    return judged > 0, {"seed": seed, **said, "log": text[-TAIL:]}, text


def verdicts(folder: Path, backend: str) -> Row:
    """What the fuzzer stored of each program, also where it was ended: how many of each kind, and what went wrong."""
    lines = [line for path in folder.glob(f"{backend}-*.jsonl") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines if line.endswith("}")]
    by_status = dict(Counter(row["status"] for row in found))
    wrong = [f"{r['number']}: {r['status']}: {r['detail']}"[:300] for r in found if r["status"] in FAILURES]
    return {"programs": len(found), **by_status, "wrong": wrong}


def probe(name: str, seconds: float, device: str) -> tuple[bool, Row, str]:
    """Whether a probe answered, and the answer."""
    tiny = ["--tiny"] if device == "cpu" else []
    ran = run_within([sys.executable, "-m", "bench.probes", name, *tiny], seconds)
    answers = [line for line in ran.text.splitlines() if line.startswith("{")]
    if ran.code == 0 and answers:
        return True, json.loads(answers[-1]), ran.text
    return False, {"failed": "ended" if ran.code is None else f"exit {ran.code}", "log": ran.text[-TAIL:]}, ran.text


class Session:
    """One run of the agenda, until its time is over."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.until = time.monotonic() + 60 * options.minutes - SPARE
        self.device = "cpu" if options.tiny else "cuda"
        self.out: Path = options.out
        _take_over(self.out)
        self.rows = Rows(self.out / "gpu.json")
        here = self.device == "cpu" or torch.cuda.is_available()
        self.card = card(self.device) if here else next(iter(self.rows.cards()), "")
        self.parts = parts_beside(self.rows.path)
        self.runner = Runner(self.rows, self.card, options.in_process)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def items(self) -> list[Item]:
        """What is to be done, in order: what another card has comes last."""
        chosen = [in_small(item) if self.options.tiny else item for item in agenda(self.card)]
        chosen = [item for item in dict.fromkeys(chosen) if kind(item) in self.options.parts and self._named(item)]
        states = {item.name: state(item, self.rows, self.parts, self.card) for item in chosen}
        wanted = [item for item in chosen if states[item.name] != "current" or item.name.startswith("longest ")]
        return sorted(wanted, key=lambda item: states[item.name] == "other card")

    def _named(self, item: Item) -> bool:
        return not self.options.only or any(fnmatch.fnmatch(item.name, p) for p in self.options.only)

    def dry(self) -> None:
        """Say what would be done, what is known of it, and how long it will take."""
        left = self.left
        print(f"on {self.card}, {left:.0f} s")
        for item in self.items():
            seconds = expected(item, self.rows, self.parts, self.card)
            begun = seconds <= left and not self._is_too_long(item)
            left -= seconds * begun
            known = state(item, self.rows, self.parts, self.card)
            last = self._last(item)
            took = f"{last:.0f} s last time" if last else "never run here"
            print(f"{'run ' if begun else 'skip'} {item.name}: {known}, {seconds:.0f} s expected, {took}")

    def _is_too_long(self, item: Item) -> bool:
        case = resolved(item, self.rows, self.card)
        return case is not None and too_long_at(self.rows, self.card, case) > 0

    def _last(self, item: Item) -> float | None:
        case = resolved(item, self.rows, self.card)
        if case is None:
            return self.parts.get(f"{self.card}/{item.name}", {}).get("seconds")
        return took(self.rows.find(self.card, case) or {})

    def run(self) -> bool:
        """Do what fits; whether nothing was left out."""
        try:
            done = [self._try(item) for item in self.items()]  # each, whatever became of the one before
            return all(done)
        finally:
            self.runner.close()

    def _try(self, item: Item) -> bool:
        """Do one, if it fits. A part that breaks must not cost the others their time."""
        try:
            return self._do(item)
        except Exception:
            traceback.print_exc()
            return False

    def _do(self, item: Item) -> bool:
        if expected(item, self.rows, self.parts, self.card) > self.left:
            return False
        case = resolved(item, self.rows, self.card)
        if case is not None:
            return self._row(item, case)
        return item.name.startswith("longest ") or self._part(item)

    def _row(self, item: Item, case: Any) -> bool:
        hindrance = why_not(case, self.rows, self.card)
        if hindrance:
            print(f"{item.name}: {hindrance}", flush=True)
            return True
        row = self.runner.measure(case, self.left)
        figure = "ended: no time" if row is None else row.get("failed") or f"{row['tokens_per_second']:.0f} tokens/s"
        self._say(item, figure)
        return row is not None

    def _part(self, item: Item) -> bool:
        started = time.monotonic()
        if item.name == "tests":
            finished, said, text = tests(self.left, self._cut_off(item))
        elif item.name == "fuzz":
            finished, said, text = fuzz(self.left, self.device)
        else:
            finished, said, text = probe(item.name.split()[1], self.left, self.device)
        if item.name in ("tests", "fuzz"):
            (self.out / f"{item.name}.log").write_text(text)
        part = {"seconds": time.monotonic() - started, "finished": finished, "said": said}
        self.parts[f"{self.card}/{item.name}"] = {
            **made(self.device),
            "card": self.card,
            "code": roster.part_code(),
            **part,
        }
        write_whole(self.out / "device.json", {"parts": self.parts})
        self._say(item, json.dumps({key: value for key, value in said.items() if key not in pages.UNSAID}))
        return finished

    def _cut_off(self, item: Item) -> Row | None:
        """What a run of a part said that was ended, if it was of this very code."""
        part = self.parts.get(f"{self.card}/{item.name}", {})
        known = part.get("code") == roster.part_code() and not part["finished"]
        return part["said"] if known else None

    def _say(self, item: Item, what: str) -> None:
        print(f"{item.name}: {what} ({self.left:.0f} s left)", flush=True)


def _take_over(out: Path) -> None:
    """Begin with the committed rows and answers where the folder has none."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "device.json"):
        if (RESULTS / name).exists() and not (out / name).exists():
            shutil.copy(RESULTS / name, out / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agenda; 0 where nothing was left out, 3 where time was short or something did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of wall-clock time, for all")
    parser.add_argument("--dry", action="store_true", help="say what would be run")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of the program itself, on the CPU")
    parser.add_argument("--in-process", action="store_true", help="no process of its own for each row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", nargs="+", help="names of parts, or rows (MODEL/LAYERS/TOKENS/PEER), with wildcards")
    options = parser.parse_args(arguments)
    if not options.tiny and not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --tiny tests the program itself, --dry says what would be run")
    session = Session(options)
    if options.dry:
        session.dry()
        return 0
    try:
        finished = session.run()
    finally:
        pages.write(session.rows, session.parts)
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
