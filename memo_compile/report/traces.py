"""Artifacts for torch's structured trace, which `tlparse` turns into pages.

Private torch APIs, tried with torch 2.13: `trace_structured` and `trace_log` of `torch._logging._internal`.
"""

from __future__ import annotations

from pathlib import PurePath


def tracing() -> bool:
    """Whether `TORCH_TRACE` asks for a structured trace."""
    from torch._logging._internal import trace_log  # loads torch

    return bool(trace_log.handlers)


def artifact(file: str, text: str) -> None:
    """Put `text` into the trace, as the artifact `memo_FILE` of the graph that is being compiled."""
    from torch._logging._internal import trace_structured  # loads torch

    path = PurePath(file)
    encoding = "json" if path.suffix == ".json" else "string"
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"memo_{path.stem}", "encoding": encoding},
        payload_fn=lambda: text,
    )
