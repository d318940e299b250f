"""A CUDA that does nothing: streams, events and copies for `StreamEngine` that cost next to nothing themselves."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Idle:
    """A stream, or an event."""

    cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class IdleCuda:
    """What `StreamEngine` asks of `torch.cuda`, done by nobody."""

    Event = Idle

    def __init__(self) -> None:
        self.stream = Idle()

    def Stream(self, device: torch.device) -> Idle:  # noqa: N802
        return self.stream

    def current_stream(self, device: torch.device) -> Idle:
        return self.stream

    def capturing(self) -> bool:
        return False

    def on(self, stream: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def copy(self, *what: Any) -> None:
        pass

    def copy_planes(self, *what: Any) -> bool:
        return True

    def kept(self, device: torch.device) -> tuple[int, int]:
        return 2**62, 0
