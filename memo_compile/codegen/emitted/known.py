"""Lines of emitted text that memo knows: they touch what they name, and keep nothing of it.

Of any other (the call of a region or a custom op, a loop, a branch, another stream's block) nobody can tell from the
text what it keeps, or whether what it makes is what it was given. What such a line names stays with torch's allocator,
which frees a storage when nothing refers to it.
"""

from __future__ import annotations

import ast
import re

import torch

# torch's own, whose schemas tell what is written and what results are views of; and memo's.
NAMESPACES = frozenset(
    {
        *("aten", "prim", "prims", "rngprims", "inductor", "inductor_prims", "_c10d_functional"),
        *("mkl", "mkldnn", "onednn", "quantized", "quantized_decomposed", "memo"),
    }
)
_FUNCTION = re.compile(
    # kernels that Inductor writes, those that users write in Triton, and kernels with a place for their result
    r"(?:cpp|cuda|cutlass|cutedsl|mps|rocm|triton)_\w+|\w+\.run|extern_kernels(?:\.\w+)+"
    # what it calls beside
    r"|assert_size_stride|assert_alignment|copy_if_misaligned|empty_strided_\w+|alloc_from_pool|reinterpret_tensor"
    r"|\w+\.(?:copy_|item|size|stride)|get_raw_stream|torch\.(?:cuda|xpu)\.set_device|torch\.device"
    r"|torch\.(?:cuda|xpu)\.current_device|aten(?:\.\w+)+"
    rf"|torch\.ops\.(?:{'|'.join(sorted(NAMESPACES))})(?:\.\w+)+"
)
_GUARD = re.compile(r"torch\.(cuda|xpu|mtia)\._DeviceGuard\((\d+)\)")
_AROUND = re.compile(r"(?:torch\.profiler\.)?record_function\(.*\)")


def is_known_op(op: object) -> bool:
    """Whether an op's schema can be believed."""
    return isinstance(op, torch._ops.OpOverload) and op.namespace in NAMESPACES


def is_known(statement: ast.stmt) -> bool:
    """Whether a statement is of a form that memo knows, all of whose calls are of functions that it knows."""
    if isinstance(statement, (ast.Delete, ast.Pass)):
        return True
    if isinstance(statement, ast.Assign):
        if not all(isinstance(target, ast.Name) for target in statement.targets):
            return False
    elif not isinstance(statement, ast.Expr):
        return False
    named = isinstance(statement.value, (ast.Call, ast.Name, ast.Subscript, ast.Constant))
    calls = (n for n in ast.walk(statement) if isinstance(n, ast.Call))
    return named and all(_FUNCTION.fullmatch(ast.unparse(call.func)) for call in calls)


def device_of(block: ast.With) -> str | None:
    """The device that a block makes the current one, "cuda:1"; None for any other block."""
    match = _GUARD.fullmatch(ast.unparse(block.items[0].context_expr))
    return f"{match[1]}:{match[2]}" if match else None


def is_known_block(block: ast.With) -> bool:
    """Whether a block only says on which device, or under which name, its statements run."""
    return all(
        _GUARD.fullmatch(text) or _AROUND.fullmatch(text)
        for text in (ast.unparse(item.context_expr) for item in block.items)
    )
