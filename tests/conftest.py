import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh():
    """Each test compiles anew, and leaves nothing behind."""
    import memo_compile

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    memo_compile.reset()
