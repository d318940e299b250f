import os

# Off as outside of CI: a test calls an op whose schema is wrong, of which torch warns.
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "0"

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_profile_of_this_machine(monkeypatch, tmp_path_factory):
    """Costs are the same on every machine, whatever `memo doctor --measure` stored on this one."""
    monkeypatch.setenv("MEMO_PROFILES", str(tmp_path_factory.getbasetemp() / "no-profiles"))


@pytest.fixture(autouse=True)
def _nothing_from_the_cache(monkeypatch):
    """Every test plans and compiles what it looks at, unless it is the cache that it looks at."""
    monkeypatch.setenv("MEMO_CACHE", "0")


@pytest.fixture(autouse=True)
def _fresh():
    """Each test compiles anew, and leaves nothing behind."""
    import memo_compile

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    memo_compile.reset()
