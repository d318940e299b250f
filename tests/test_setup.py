"""What an installation gives: backends by name, light imports, one package. And what the project says of itself."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from bench.compat import row

ROOT = Path(__file__).parent.parent
PROJECT = ("pyproject.toml", "README.md", "LICENSE")
RUN = '<testsuites><testsuite time="2"><testcase classname="a" name="b">{}</testcase></testsuite></testsuites>'


def python(script, folder):
    """Run a script in a process of its own, outside the checkout."""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_backends_are_found_without_an_import(tmp_path):
    python(
        "import sys, torch; found = torch._dynamo.list_backends();"
        "assert {'memo', 'memo_eager'} <= set(found), found; assert 'memo_compile' not in sys.modules",
        tmp_path,
    )


def test_an_import_loads_neither_inductor_nor_highs(tmp_path):
    """Nor does reaching for what is documented as `memo_compile.NAME`."""
    python(
        "import sys, memo_compile; assert 'torch' not in sys.modules;"
        "memo_compile.placement.Buffer; memo_compile.models.Llama; memo_compile.errors.MemoError;"
        "assert not {'torch._inductor', 'highspy'} & set(sys.modules); assert not hasattr(memo_compile, 'nothing')",
        tmp_path,
    )


@pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="building a wheel here needs setuptools 77")
def test_a_wheel_holds_one_package_and_the_backends(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "memo_compile", source / "memo_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for name in PROJECT:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", tmp_path, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"memo_compile"}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "memo_compile").rglob("*.*") if p.is_file()}
    assert {n for n in here if not n.endswith(".pyc")} <= set(names)


def test_both_backends_are_entry_points():
    found = {e.name: e.value for e in entry_points(group="torch_dynamo_backends")}
    assert found["memo"] == "memo_compile.backend:memo"
    assert found["memo_eager"] == "memo_compile.backend:memo_eager"


def test_passes_at_the_top_is_a_link():
    assert (ROOT / "passes").is_symlink()
    assert (ROOT / "passes").resolve() == ROOT / "memo_compile" / "passes"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "tools"), [("demo", False), ("test", True), ("lint", True), ("check", True)])
def test_each_target_installs_what_it_needs(target, tools):
    done = subprocess.run(["make", "-nB", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install --quiet -e ." in done.stdout
    assert ("[test,dev]" in done.stdout) == tools


def test_a_module_with_private_torch_apis_is_listed_in_the_design():
    design = (ROOT / "docs" / "design.md").read_text()
    package = ROOT / "memo_compile"
    says = re.compile(r"Private torch API|Private: `torch|private parts of torch")
    using = [p.relative_to(package).as_posix() for p in package.rglob("*.py") if says.search(p.read_text())]
    assert len(using) > 10
    assert not [name for name in using if f"`{name}`" not in design]


@pytest.mark.parametrize(
    ("xml", "passed", "failed"),
    [
        (RUN.format(""), 1, []),
        (RUN.format("<skipped/>"), 0, []),
        (RUN.format("<failure/>"), 0, ["a::b"]),
        (RUN.format("<error/>"), 0, ["a::b"]),
        ("<testsuites><testsuite/></testsuites>", 0, ["no test ran"]),
        (None, 0, ["no test ran"]),
    ],
)
def test_a_compat_run_that_failed_or_never_was_is_told(xml, passed, failed, tmp_path):
    path = tmp_path / "smoke.xml"
    if xml is not None:
        path.write_text(xml)
    found = row("2.11.0", path)
    assert (found["passed"], found["failed"]) == (passed, failed)


def test_lint_and_types_read_every_directory():
    """No part of the package or of its tests is left out: a pattern would also match folders of that name within."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert not {"exclude", "extend-exclude"} & (tools["ruff"].keys() | tools["ruff"]["lint"].keys())
    assert not {"exclude", "ignore_errors"} & tools["mypy"].keys()
    assert all(o.keys() == {"module", "ignore_missing_imports"} for o in tools["mypy"]["overrides"])
    pytest.importorskip("ruff")
    files = [sys.executable, "-m", "ruff", "check", "--show-files", "--no-cache", str(ROOT)]
    read = {Path(p) for p in subprocess.run(files, capture_output=True, text=True, check=True).stdout.splitlines()}
    for folder in ("memo_compile", "tests", "bench", "examples"):
        assert set((ROOT / folder).rglob("*.py")) <= read
