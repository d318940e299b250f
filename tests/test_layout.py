"""How the package is built: imports run downwards, those inside functions say why, and no module is long."""

import ast
from pathlib import Path

import pytest

import memo_compile

PACKAGE = Path(memo_compile.__file__).parent
LONGEST = 400  # lines of a module

# From the ground up: a part imports from its own floor and from those below.
FLOORS = (
    ("errors", "quiet", "schema", "versions"),
    ("logs", "registry"),
    ("models", "placement", "hardware", "progress"),
    ("data", "options", "passes"),
    ("workspaces",),
    ("planning",),
    ("runtime",),
    ("trace",),
    ("codegen",),
    ("forecast", "report"),
    ("regression",),
    ("api", "backend", "testing"),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
MODULES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = (ast.Import, ast.ImportFrom)


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node):
    """The parts of the package that an import names."""
    if isinstance(node, ast.ImportFrom) and node.module == "memo_compile":
        return {alias.name for alias in node.names}
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("memo_compile.")}


def upward(path, source):
    """What a module imports from a floor above its own, wherever in it the import stands."""
    floor = FLOOR[part_of(path)]
    found = {part for node in ast.walk(ast.parse(source)) if isinstance(node, IMPORTS) for part in imported(node)}
    return {part for part in found if FLOOR.get(part, -1) > floor}


def unexplained(source):
    """Lines of the imports within functions that have no comment, on theirs or a neighbour's line or above."""
    lines, tree = source.splitlines(), ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {n.lineno for f in functions for n in ast.walk(f) if isinstance(n, IMPORTS)}
    found = []
    for line in sorted(inner):
        first = line
        while first - 1 in inner:
            first -= 1
        block = [lines[i - 1] for i in range(first - 1, line + 1)]
        if not any("#" in text for text in block):
            found.append(line)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_keeps_the_house_rules(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    if path.parent != PACKAGE or path.name != "__init__.py":  # which only names where the public names live
        assert not upward(path, source)
        assert not unexplained(source)


def test_every_part_has_a_floor():
    parts = {part_of(path) for path in MODULES} - {"__init__"}
    assert parts == FLOOR.keys()


def test_passes_planning_and_placement_know_nothing_of_what_runs_or_shows():
    """Said by name, whatever the floors: who changes these must change this."""
    for part in ("passes", "workspaces", "planning", "placement"):
        assert all(FLOOR[part] < FLOOR[other] for other in ("codegen", "runtime", "report"))
    assert FLOOR["codegen"] < FLOOR["report"]


@pytest.mark.parametrize(("folder", "above"), [("fx", ("analysis", "transforms")), ("analysis", ("transforms",))])
def test_facts_know_no_passes_and_what_annotates_knows_nothing_of_what_acts(folder, above):
    for path in (PACKAGE / "passes" / folder).glob("*.py"):
        assert not [part for part in above if f"memo_compile.passes.{part}" in path.read_text(encoding="utf-8")], path


def test_an_import_upwards_and_one_without_a_reason_are_found():
    planning = PACKAGE / "planning" / "decide.py"
    assert upward(planning, "def f():\n    from memo_compile.runtime.ops import pool\n") == {"runtime"}
    assert upward(planning, "from memo_compile import report\n") == {"report"}
    assert upward(planning, "import memo_compile.codegen.wrapper\n") == {"codegen"}
    assert not upward(planning, "from memo_compile.passes.fx.facts import nbytes\n")
    assert unexplained("def f():\n    import torch\n") == [2]
    assert not unexplained("def f():\n    import torch  # takes a second\n    import rich\n")
