"""A pytest plugin: `memo check` from a test. In a conftest.py: `pytest_plugins = ["memo_compile.testing"]`.

    def test_memory_of_the_small_model(memo_check):
        memo_check(small_model, baseline="tests/baselines/h100.json", hardware="h100")

`pytest --memo-update` writes the baselines instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--memo-update`."""
    parser.addoption("--memo-update", action="store_true", help="write the baselines of memo_check")


@pytest.fixture
def memo_check(pytestconfig: pytest.Config) -> Callable[..., None]:
    """A function that fails the test where a model's memory or time regress against a baseline.

    Its arguments: `make`, a function that returns (model, args), (model, args, kwargs) or (model, args, kwargs,
    options), or its name as package.module:function; `baseline`, a path from pytest's root; `hardware`, a profile's
    name (the baseline's); `tolerance`, a sequence of NAME=SHARE.
    """

    def run(
        make: Callable[[], Any] | str,
        *,
        baseline: str | Path,
        hardware: str | None = None,
        tolerance: Sequence[str] = (),
    ) -> None:
        from memo_compile.regression.baseline import tolerances  # loaded when the fixture is used
        from memo_compile.regression.changes import text
        from memo_compile.regression.check import check
        from memo_compile.trace.targets import load_target

        function = load_target(make) if isinstance(make, str) else make
        name = make if isinstance(make, str) else f"{make.__module__}:{make.__qualname__}"
        path = pytestconfig.rootpath / baseline
        update = pytestconfig.getoption("--memo-update")
        changes = check({name: function}, path, tolerances(tolerance), hardware=hardware, update=update)
        if any(c.regression for c in changes):
            pytest.fail(text(changes), pytrace=False)

    return run
