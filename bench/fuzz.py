"""Draws whole programs, and holds memo against eager in float64, poison and the order of budgets.

    python -m bench.fuzz --cases 10000 --seed 1 --jobs 2 [--backend memo_eager]
    python -m bench.fuzz --cases 1000 --seed 1 --jobs 2 --backend memo
    python -m bench.fuzz --report

Verdicts are appended to a file in `bench/results/fuzz`, which is committed: the same command goes on where it stopped
(Ctrl-C or a kill is no harm), on any machine, and each verdict has its commit. A failing
program is made smaller and stored in `tests/fuzz_cases`, where pytest collects it. `--report` writes what all runs
found to `bench/results/fuzz.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.fuzzing.oracle import Verdict
from bench.fuzzing.programs import Program, draw
from bench.fuzzing.reduction import reduced, store
from bench.fuzzing.report import commit, rows, section, versions
from bench.fuzzing.workers import Task, Worker, judged

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "fuzz"
NOTES = RESULTS / "fuzz-notes.md"
SECONDS = {"memo_eager": 600.0, "memo": 1800.0}  # for one program, also on a machine that is shared by many


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--backend", default="memo_eager", choices=["memo", "memo_eager"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no program after these")
    parser.add_argument("--ladder", type=int, default=4, help="measure several budgets of every so-manieth program")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of verdicts")
    parser.add_argument("--no-reduction", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.runs)
        return
    sys.exit(run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Judge what has no verdict yet; 1 where a program failed."""
    path: Path = arguments.runs / f"{arguments.backend}-{arguments.device}-{arguments.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {row["number"] for row in rows(path)}
    tasks = tasks_of(arguments, known)
    at, seconds = commit(), SECONDS[arguments.backend]
    tally: Counter[str] = Counter(row["status"] for row in rows(path))
    failed = 0
    for task, verdict, took in judged(tasks, arguments.jobs, seconds, time.monotonic() + 60 * arguments.minutes):
        tally[verdict.status] += 1
        with path.open("a") as file:
            row = {"number": task.number, "status": verdict.status, "detail": verdict.detail}
            row |= {"refusals": verdict.refusals, "seconds": round(took, 2), "commit": at}
            file.write(json.dumps(row) + "\n")
        if verdict.failed:
            failed += 1
            print(f"{task.number}: {verdict.status}: {verdict.detail}", flush=True)
            if not arguments.no_reduction:
                print(f"    {_kept(task, verdict, seconds)}", flush=True)
        if sum(tally.values()) % 50 == 0:
            print(dict(tally), flush=True)
    print(dict(tally), flush=True)
    return int(bool(failed))


def tasks_of(arguments: argparse.Namespace, known: set[int]) -> Iterator[Task]:
    """The programs of a seed that have no verdict."""
    for number in range(arguments.cases):
        if number not in known:
            ladder = arguments.backend == "memo" and number % arguments.ladder == 0
            yield Task(number, draw(f"{arguments.seed}/{number}"), arguments.backend, arguments.device, ladder)


def _kept(task: Task, verdict: Verdict, seconds: float) -> Path:
    """Make a failure smaller, in a process of its own, and store it."""
    worker = Worker(seconds)

    def judge(program: Program) -> Verdict:
        return worker.judge(replace(task, program=program))

    try:
        smallest, seen = reduced(task.program, verdict, judge, seconds)
    finally:
        worker.close()
    return store(smallest, seen, task.backend, task.ladder)


def report(folder: Path) -> None:
    """Write what all runs found."""
    parts = ["`python -m bench.fuzz --report`\n", versions() + "\n"]
    for path in sorted(folder.glob("*.jsonl")):
        backend, device, seed = path.stem.split("-", 2)
        parts.append(section(f"{backend} on {device}", seed, rows(path)))
    if NOTES.exists():
        parts.append(NOTES.read_text())
    (RESULTS / "fuzz.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
