"""What needs a CUDA device is skipped, with the reason, where there is none."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
