"""What `make test-compat` found, as a table: one row for each torch that memo was tried with.

    python -m bench.compat NAME=junit.xml …

`NAME` is the torch version, the file what pytest wrote with `--junitxml`. Ends with 1 where a test failed or none ran.
"""

from __future__ import annotations

import argparse
import platform
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.common import save


def row(version: str, path: Path) -> dict[str, Any]:
    """Counts of one run, and the names of the tests that failed."""
    suite = ElementTree.parse(path).getroot().find("testsuite") if path.is_file() else None
    cases = [] if suite is None else list(suite.iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "torch": version,
        "python": platform.python_version(),
        "passed": len(cases) - skipped - len(failed),
        "skipped": skipped,
        "failed": failed if cases else ["no test ran"],
        "seconds": 0.0 if suite is None else float(suite.get("time", 0)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| torch | passed | skipped | failed | seconds |", "|---|---|---|---|---|"]
    for r in rows:
        failed = "<br>".join(r["failed"]) or "0"
        lines.append(f"| {r['torch']} | {r['passed']} | {r['skipped']} | {failed} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Read the runs and write the table; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE")
    pairs = [text.split("=", 1) for text in parser.parse_args().runs]
    rows = [row(version, Path(path)) for version, path in pairs]
    save("compat", "make test-compat", rows, table(rows))
    print(table(rows))
    return 1 if any(r["failed"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
