"""What needs a CUDA device is skipped, with the reason, where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Inductor's advice on speed is no fault."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"))


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
