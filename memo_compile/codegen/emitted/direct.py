"""Emitted calls of memo's transfers as calls of plain functions: the last change to a text that has been inspected."""

from __future__ import annotations

import re
from collections.abc import Sequence

from memo_compile.codegen.emitted.text import NAMESPACE

# Ops by the function of `memo_compile.runtime.direct` that does the same.
_FUNCTIONS = {
    "offload": "offload",
    "offload_wait": "offload_wait",
    "prefetch_": "prefetch",
    "wait_": "wait",
    "prefetch_buffer": "prefetch_buffer",
}
_OP = re.compile(rf"{re.escape(NAMESPACE)}(\w+)\.default\(")


def direct(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the module imports, and the lines.

    >>> direct(["torch.ops.memo.wait_.default(buf1, lease, 0)", "torch.ops.memo.keep.default(buf1)"])[1]
    ['memo_wait(buf1, lease, 0)', 'torch.ops.memo.keep.default(buf1)']
    """
    found = [_OP.sub(_called, line) for line in lines]
    if found == list(lines):
        return [], found
    names = ", ".join(f"{name} as memo_{name}" for name in _FUNCTIONS.values())
    return [f"from memo_compile.runtime.direct import {names}"], found


def _called(op: re.Match[str]) -> str:
    name = _FUNCTIONS.get(op[1])
    return f"memo_{name}(" if name is not None else op[0]
