"""A CUDA runtime that keeps a last error, as the real one does, and a torch that finds it there."""

import ctypes

import torch

from memo_compile.runtime import blocks, cudart

GPU = torch.device("cuda", 0)
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, as cudaHostRegister refuses


class Runtime:
    """`refuse` is the error of every call; 0 for none."""

    def __init__(self, refuse=0):
        self.refuse, self.last = refuse, 0
        self.registered, self.copies, self.history = {}, [], []

    def _end(self):
        self.last = self.refuse or self.last
        return self.refuse

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        if not self.refuse:
            self.registered[address] = nbytes
            self.history.append(("register", nbytes))
        return self._end()

    def cudaHostUnregister(self, address):  # noqa: N802
        self.history.append(("unregister", self.registered.pop(address)))
        return self._end()

    def cudaGetLastError(self):  # noqa: N802
        error, self.last = self.last, 0
        return error

    def cudaMemcpyAsync(self, dst, src, nbytes, kind, stream):  # noqa: N802
        if self.refuse:
            return self._end()
        self.copies.append((kind, stream, nbytes))
        ctypes.memmove(dst, src, nbytes)
        return 0

    def cudaMemcpy2DAsync(self, dst, dst_pitch, src, src_pitch, width, height, kind, stream):  # noqa: N802
        if self.refuse:
            return self._end()
        self.copies.append((kind, stream, width, height))
        for row in range(height):
            ctypes.memmove(dst + row * dst_pitch, src + row * src_pitch, width)
        return 0


def install(monkeypatch, runtime):
    """As if a GPU were here: its runtime is `runtime`, and no graph is being captured."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(cudart, "library", lambda: runtime)
    monkeypatch.setattr(blocks, "node_of_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return runtime


def forbid(monkeypatch):
    """As on a machine with a GPU that is somebody else's: whoever touches it is found out."""

    def touched(*args, **kwargs):
        raise AssertionError("CUDA was touched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cudart", "current_device", "get_device_properties", "is_current_stream_capturing", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, touched)
    for name in ("_lazy_init", "current_stream", "synchronize", "memory_stats", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, touched)
