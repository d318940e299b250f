"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from memo_compile.errors import NoReport
from memo_compile.report.timeline import REPORT_VERSION


def read_reports(root: Path) -> list[dict[str, Any]]:
    """The data of every graph in a dump: of `root` itself, or of the folders in it.

    Raises:
        NoReport: there is none, or it is of another version.
    """
    found = []
    for folder in (root, *sorted(root.glob("*/"))):
        path = folder / "report.json"
        if not path.is_file():
            continue
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise NoReport(f"{path} is no JSON: {error}") from error
        if data.get("version") != REPORT_VERSION:
            raise NoReport(f"{path} has version {data.get('version')}; this memo reads {REPORT_VERSION}: dump it again")
        found.append(data)
    if not found:
        raise NoReport(
            f"{root} holds nothing to report on: neither it nor a folder in it has a report.json. "
            'Dumps are written with options={"dump": DIR}, or MEMO_DUMP=DIR.'
        )
    return found


def page(reports: Sequence[dict[str, Any]]) -> str:
    """The whole page, data, style and script in it."""
    here = files("memo_compile.report")
    html, style, script = (here.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    # "</" would end the element that the data stands in.
    data = json.dumps(list(reports), separators=(",", ":")).replace("</", "<\\/")
    parts = {"/*STYLE*/": style, "/*DATA*/": data, "/*SCRIPT*/": script}
    for mark, text in parts.items():
        before, _, after = html.partition(mark)
        html = before + text + after
    return html
