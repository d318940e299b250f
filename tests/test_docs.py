"""README and docs: each Python snippet runs, each `memo` command too; links lead somewhere; errors are explained."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

from memo_compile import cli, errors

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_snippets_run_in_order(page, tmp_path, monkeypatch):
    """A Python block that begins with a file's name is that file; blocks of one page share their names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"__name__": "snippet"}
    if page.name in ("README.md", "report.md"):  # their first lines are for a model that a reader has
        names |= {"torch": torch, "model": torch.nn.Linear(4, 4)}
    for language, text in blocks(page):
        file = FILE.match(text)
        if file:
            (tmp_path / file[1]).write_text(text)
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
        else:
            for line in text.splitlines():
                program, *arguments = shlex.split(line, comments=True) or [""]
                if program == "memo":
                    assert cli.main(arguments) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_error_has_an_entry_in_troubleshooting():
    headings = set(re.findall(r"^### (\w+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE))
    classes = {name for name, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__}
    assert headings == classes - {"MemoError"}


def test_every_option_is_explained():
    from dataclasses import fields

    from memo_compile.options import Options

    text = (ROOT / "docs" / "options.md").read_text()
    assert not [f.name for f in fields(Options) if f"`{f.name}`" not in text]
