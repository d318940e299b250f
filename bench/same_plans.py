"""Whether two commits make the same plans: those of the tests' models, compared value by value.

    python -m bench.same_plans BEFORE [AFTER] [--only NAME] [--keep FOLDER] [--results]

Each commit is checked out beside, plans its own copy of the tests' models under the budgets of `BUDGETS`, offline and
with arenas from dry runs, and writes the plans' JSON. AFTER is the working tree where it is left out. Left out of the
comparison are the seconds that planning took and the folder of the checkout. A plan of an earlier version of the schema
is read as what it says. Keys that one side does not write are told once. Ends with 1 where a value differs.

With `--keep` the plans of commits stay in a folder, so that a comparison can be made in pieces; `--results` writes what
came of it to `bench/results/same_plans.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "min": {"memory_budget": "min"},
    "0.7": {"memory_budget": 0.7},
    "recomputed": {"memory_budget": "min", "offload": False},
    "all": {"offload": "all"},
}
TOKENS = 1024  # enough for slices
PINNED = {"hardware": "h100", "host_budget": 2**33}  # figures do not hang on this machine
SHOWN = 12  # differences of one plan
Difference = tuple[str, Any, Any]


def write(tree: Path, out: Path, only: str) -> None:
    """Plan the models of the checkout `tree`, which must be first on Python's path, into a JSON file."""
    sys.path.insert(0, str(tree / "tests" / "helpers"))
    import torch
    import zoo
    from torch._subclasses import FakeTensorMode

    import memo_compile
    from memo_compile.codegen.planned_step import plan_step
    from memo_compile.trace.targets import made_of_fakes

    assert Path(memo_compile.__file__).is_relative_to(tree), memo_compile.__file__
    zoo.TOKENS = TOKENS
    torch.set_num_threads(1)
    plans: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for name in zoo.MODELS:
        for budget, options in BUDGETS.items():
            key = f"{name} {budget}"
            if only not in key or key in plans:
                continue
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            model, args, kwargs, _ = made_of_fakes(name, partial(_made, zoo, name), mode)
            try:
                step = plan_step(mode, model, args, kwargs, {**PINNED, **options})
                found = [json.loads(graph.plan.to_json()) for graph in step.graphs]
            except memo_compile.MemoError as error:
                found = [{"refused": str(error)}]
            plans[key] = json.loads(json.dumps(found).replace(f"{tree}{os.sep}", ""))
            print(f"{key}: {len(found)} graphs", file=sys.stderr)
            out.write_text(json.dumps(plans, indent=1), encoding="utf-8")


def _made(zoo: Any, name: str) -> tuple[Any, tuple[Any], dict[str, Any]]:
    import torch

    x = torch.zeros((1, TOKENS), dtype=torch.int64)
    return zoo.make(name), (x,), {"labels": x}


def differences(before: Any, after: Any, path: str = "") -> Iterator[Difference]:
    """Where two plans differ: the path, and both values.

    >>> list(differences({"a": [1, 2]}, {"a": [1, 3], "b": 0}))
    [('a[1]', 2, 3)]
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() & after.keys() - ({"seconds", "version"} if "predicted_peak" in before else set()):
            yield from differences(before[key], after[key], f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{path}[{i}]")
    elif before != after:
        yield path, before, after


def keys(value: Any, path: str = "") -> set[str]:
    """The paths of all keys, items of a list taken together.

    >>> sorted(keys({"a": [{"b": 1}, {"c": 2}]}))
    ['a', 'a[].b', 'a[].c']
    """
    if isinstance(value, list):
        return set().union(*(keys(item, f"{path}[]") for item in value))
    if not isinstance(value, dict):
        return set()
    found = {f"{path}.{key}" if path else key for key in value}
    return found.union(*(keys(item, f"{path}.{key}" if path else key) for key, item in value.items()))


def values(found: Any) -> int:
    """How many numbers and words a plan has.

    >>> values([{"a": [1, 2], "b": {}}, "c"])
    3
    """
    if isinstance(found, dict):
        found = list(found.values())
    return sum(values(item) for item in found) if isinstance(found, list) else 1


def plans_of(commit: str | None, only: str, keep: Path | None) -> dict[str, Any]:
    """The plans that a commit makes; None: the working tree's. Those that lie in `keep` are not made again."""
    repository = HERE.parent.parent
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree" if commit else repository
        out = (keep.resolve() if keep and commit else Path(folder)) / f"{commit or 'plans'}.json"
        if commit:
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=repository, check=True)
        try:
            own = {"PYTHONPATH": str(tree), "MEMO_PROFILES": str(Path(folder) / "none")}
            own["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
            command = [sys.executable, HERE, "--write", out, "--tree", tree, "--only", only]
            subprocess.run(command, cwd=folder, env={**os.environ, **own}, check=True)
        finally:
            if commit:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=repository, check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return {name: [upgraded(plan) for plan in plans] for name, plans in found.items() if only in name}


def short(commit: str | None) -> str | None:
    """A commit as git abbreviates it."""
    if commit is None:
        return None
    command = ["git", "rev-parse", "--short=9", commit]
    return subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True, text=True).stdout.strip()


def page(before: Mapping[str, Any], after: Mapping[str, Any], commits: Sequence[str | None]) -> str:
    """The comparison as a page of results."""
    import torch

    old, new = (commit or "the working tree" for commit in commits)
    command = " ".join(["python -m bench.same_plans", *(commit for commit in commits if commit)])
    rows = [
        f"| {name} | {len(before.get(name, ()))} | {values(before.get(name, []))} "
        f"| {len(list(differences(before.get(name), after.get(name))))} |"
        for name in sorted(before.keys() | after.keys())
    ]
    options = "; ".join(f"{name}: {dict(chosen)}" for name, chosen in BUDGETS.items())
    return (
        f"`{command}`\n\n"
        f"Plans of {old} beside those of {new}; torch {torch.__version__}, python {platform.python_version()}, "
        f"{TOKENS} tokens, planned for {PINNED['hardware']}. {options}. Seconds of planning are not compared.\n\n"
        "| plan | graphs | values | that differ |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """A plan as this tree's schema has it, whatever version wrote it; as it is where it is no plan for this tree."""
    from memo_compile.schema import Plan

    try:
        read: dict[str, Any] = json.loads(Plan.from_json(json.dumps(raw)).to_json())
    except ValueError:
        return raw
    return read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--only", default="", help="plans whose name contains this")
    parser.add_argument("--keep", type=Path, help="a folder where plans of commits stay, and are taken from")
    parser.add_argument("--results", action="store_true", help="write bench/results/same_plans.md")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.tree, args.write, args.only)
        return 0
    commits = short(args.before), short(args.after)
    before, after = (plans_of(commit, args.only, args.keep) for commit in commits)
    differing = 0
    for name in sorted(before.keys() | after.keys()):
        found = list(differences(before.get(name), after.get(name)))
        differing += bool(found)
        print(f"{name}: {f'{len(found)} values differ' if found else 'equal'}")
        for path, old, new in found[:SHOWN]:
            print(f"  {path}: {old!r} -> {new!r}")
    old_keys, new_keys = keys([*before.values()]), keys([*after.values()])
    for side, more in (("before", old_keys - new_keys), ("after", new_keys - old_keys)):
        if more:
            print(f"only {side}: {', '.join(sorted(more))}")
    print(f"{len(before)} plans, {differing} differ")
    if args.results:
        (HERE.parent / "results" / "same_plans.md").write_text(page(before, after, commits), encoding="utf-8")
    return int(differing > 0 or before.keys() != after.keys())


if __name__ == "__main__":
    sys.exit(main())
