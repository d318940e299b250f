"""What needs a CUDA device is skipped, with the reason, where there is none."""

import os

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    """Inductor's advice on speed is no fault. What passed in a run that was cut off is not run again."""
    done = set(os.environ.get("MEMO_TESTS_DONE", "").split("\n"))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"))


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
