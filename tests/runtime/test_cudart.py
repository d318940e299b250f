"""Page-locking and copies in two dimensions, on a CUDA runtime that is a fake."""

import pytest
import torch
from runtime.fake_cudart import GPU, OUT_OF_MEMORY, Runtime, forbid, install

from memo_compile.runtime import blocks, cudart
from memo_compile.runtime.host import HostPool
from memo_compile.runtime.ops import pool
from memo_compile.runtime.pieces import planes


def test_a_gpus_block_is_registered_and_unregistered_before_it_goes(monkeypatch):
    runtime, leases = install(monkeypatch, Runtime()), HostPool()
    lease = leases.lease(5000, device=GPU)
    assert runtime.registered == {lease.data_ptr(): 5000}
    del lease
    leases.drop_idle()
    assert runtime.registered == {}


def test_a_refusal_is_one_warning_and_leaves_no_error_behind(monkeypatch, caplog):
    runtime, leases = install(monkeypatch, Runtime(refuse=OUT_OF_MEMORY)), HostPool()
    with caplog.at_level("WARNING"):
        held = [leases.lease(1000, device=GPU), leases.lease(2000, device=GPU)]
    assert len([r for r in caplog.records if "page-locked" in r.message]) == 1
    held[0].fill_(1)
    assert runtime.last == 0, "the next kernel that torch launches would report it"
    del held
    leases.drop_idle()
    assert runtime.history == []


def test_a_failed_return_leaves_no_error_behind(monkeypatch):
    runtime, leases = install(monkeypatch, Runtime()), HostPool()
    leases.lease(1000, device=GPU)
    runtime.refuse = 1
    leases.drop_idle()
    assert runtime.last == 0


def test_without_the_library_a_kernels_launch_takes_the_error(monkeypatch):
    """Where the runtime is linked into torch: what launches a kernel finds the error, and raises it once."""
    launched = []

    def ones(*size, device):
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(cudart, "library", lambda: None)
    monkeypatch.setattr(torch, "ones", ones)
    cudart.clear_error()
    assert launched == ["cuda"]


def test_a_block_for_the_cpu_touches_no_cuda(monkeypatch):
    forbid(monkeypatch)
    leases = HostPool()
    leases.lease(1 << 22).fill_(1)
    leases.drop_idle()
    with pytest.raises(AssertionError, match="touched"):
        leases.lease(100, device=GPU)


def test_a_step_on_the_cpu_touches_no_cuda(monkeypatch):
    """Once it is compiled: Dynamo itself keeps the GPU's random state where there is one."""
    weight = torch.randn(32, 32, requires_grad=True)
    step = torch.compile(
        lambda x: torch.tanh(torch.tanh(x @ weight) @ weight).sum(), backend="memo_eager", options={"offload": "all"}
    )
    step(torch.randn(256, 32)).backward()
    pool().reset()
    forbid(monkeypatch)
    for _ in range(2):
        step(torch.randn(256, 32)).backward()
    pool().reset()


def test_blocks_of_one_kind_of_device_serve_no_other(monkeypatch):
    runtime, leases = install(monkeypatch, Runtime()), HostPool()
    leases.lease(1000)
    lease = leases.lease(1000, device=GPU)
    assert leases.held_bytes == 2000
    assert list(runtime.registered) == [lease.data_ptr()]


def test_what_a_graph_has_captured_outlives_a_reset(monkeypatch):
    """Its replays copy to the same bytes, and nobody says when it is gone."""
    runtime, leases = install(monkeypatch, Runtime()), HostPool()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    address = leases.lease(1000, device=GPU).data_ptr()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    leases.reset()
    assert list(runtime.registered) == [address]
    assert (leases.leased_bytes, leases.held_bytes) == (0, 1000), "it is no call's"
    assert leases.lease(1000, device=GPU).data_ptr() != address


@pytest.mark.parametrize(("kind", "number"), [("H2D", 1), ("D2H", 2)])
def test_planes_are_copied_by_the_runtime(monkeypatch, kind, number):
    runtime = install(monkeypatch, Runtime())
    src, dst = torch.randn(4, 8, 16)[:, :5], torch.zeros(4, 5, 16)
    assert cudart.copy_planes(planes(dst, src), kind, 77)
    assert torch.equal(dst, src)
    assert runtime.copies == [(number, 77, 5 * 16 * 4, 4)]


@pytest.mark.parametrize(("kind", "number"), [("H2D", 1), ("D2H", 2)])
def test_what_is_dense_is_copied_by_the_runtime_at_once(monkeypatch, kind, number):
    runtime = install(monkeypatch, Runtime())
    src, dst = torch.randn(4, 5, 16), torch.zeros(4, 5, 16)
    assert cudart.copy_planes(planes(dst, src), kind, 77)
    assert torch.equal(dst, src)
    assert runtime.copies == [(number, 77, 4 * 5 * 16 * 4)]


@pytest.mark.parametrize("rows", [5, 8], ids=["strided", "dense"])
def test_a_copy_that_the_runtime_refuses_leaves_no_error_behind(monkeypatch, rows):
    runtime = install(monkeypatch, Runtime(refuse=12))  # cudaErrorInvalidPitchValue
    src = torch.randn(4, 8, 16)[:, :rows]
    assert not cudart.copy_planes(planes(torch.zeros(4, rows, 16), src), "D2H", 0)
    assert runtime.last == 0


def test_without_the_library_no_plane_is_copied(monkeypatch):
    monkeypatch.setattr(cudart, "library", lambda: None)
    assert not cudart.copy_planes(planes(torch.zeros(4, 5, 16), torch.randn(4, 8, 16)[:, :5]), "D2H", 0)


MAPS = """\
7f0000000000-7f0000001000 r-xp 00000000 08:01 1 /usr/lib/libc.so.6
7f0000002000-7f0000003000 r-xp 00000000 08:01 2 /opt/other/libcudart.so.11.8.89
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
7f0000006000-7f0000007000 r-xp 00000000 08:01 3 /opt/py thon/nvidia/cuda_runtime/lib/libcudart.so.12
"""


def test_the_library_is_the_one_that_torch_has_loaded(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    assert cudart.loaded_path(maps, "12") == "/opt/py thon/nvidia/cuda_runtime/lib/libcudart.so.12"
    assert cudart.loaded_path(maps, "13") is None
    assert cudart.loaded_path(tmp_path / "nowhere", "12") is None


def test_a_block_is_near_its_gpu_before_it_is_locked_there(monkeypatch):
    """Pages that are locked no longer move."""
    runtime, order = install(monkeypatch, Runtime()), []
    monkeypatch.setattr(blocks, "bind_to_node", lambda address, nbytes, node: order.append(("bind", node)))
    monkeypatch.setattr(blocks, "node_of_device", lambda device: 3)
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *args: order.append("lock") or 0)
    HostPool().lease(1000, device=GPU)
    assert order == [("bind", 3), "lock"]
