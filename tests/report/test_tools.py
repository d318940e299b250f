"""Tools for looking into torch.compile show memo's graphs as they show others'."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys

import depyf
import torch

torch.manual_seed(0)
layers = [torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)) for _ in range(2)]
mlp = torch.nn.Sequential(*layers)
backend, folder = sys.argv[1:]
options = {"memory_budget": "min", "recompute": False}
fn = torch.compile(lambda x: mlp(x).sum(), backend=backend, options=options)
with depyf.prepare_debug(folder):
    fn(torch.randn(1, 512, 64)).backward()
"""


@pytest.fixture(scope="module", params=["memo", "memo_eager"])
def shown(request, tmp_path_factory):
    """Backend, the folder that depyf filled, and what TORCH_LOGS printed."""
    pytest.importorskip("depyf")
    folder = tmp_path_factory.mktemp(request.param)
    environment = {**os.environ, "TORCH_LOGS": "aot_graphs,output_code"}
    command = [sys.executable, "-c", SCRIPT, request.param, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, folder, done.stderr


def test_depyf_writes_the_planned_graphs(shown):
    backend, folder, _ = shown
    texts = {name: next(folder.glob(f"*{name}*.py")).read_text() for name in ("Joint", "Forward", "Backward")}
    assert "memo.offload" in texts["Forward"]
    assert "memo.prefetch_" in texts["Backward"]
    assert "memo." not in texts["Joint"]
    if backend == "memo":
        kernels = [path.read_text() for path in folder.glob("*kernel_*.py")]
        assert len(kernels) == 2
        assert all("(memo_arena_" in text for text in kernels)


def test_torch_logs_shows_the_planned_graphs_and_the_arena(shown):
    backend, _, log = shown
    assert "===== Forward graph 0 =====" in log
    assert "===== Backward graph 0 =====" in log
    assert "memo.offload" in log
    if backend == "memo":
        assert "Output code:" in log
        assert "(memo_arena_" in log
