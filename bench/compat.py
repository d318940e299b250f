"""What `make test-compat` found, as a table: one row for each torch that memo was tried with.

    python -m bench.compat NAME=junit.xml …

`NAME` is the torch version, the file what pytest wrote with `--junitxml`.
"""

from __future__ import annotations

import argparse
import platform
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.common import save


def row(version: str, path: Path) -> dict[str, Any]:
    """Counts of one run, and the names of the tests that failed."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None, f"{path} holds no test run"
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return {
        "torch": version,
        "python": platform.python_version(),
        "passed": total - skipped - len(failed),
        "skipped": skipped,
        "failed": failed,
        "seconds": float(suite.get("time", 0)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| torch | passed | skipped | failed | seconds |", "|---|---|---|---|---|"]
    for r in rows:
        failed = "<br>".join(r["failed"]) or "0"
        lines.append(f"| {r['torch']} | {r['passed']} | {r['skipped']} | {failed} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Read the runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE")
    pairs = [text.split("=", 1) for text in parser.parse_args().runs]
    rows = [row(version, Path(path)) for version, path in pairs]
    save("compat", "make test-compat", rows, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
