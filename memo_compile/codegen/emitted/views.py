"""How a placed buffer stands in emitted text: a view into its segment, as it is written and as it is read.

A segment is of the dtype that most of its buffers have. Those are `reinterpret_tensor(segment, …)`, which takes the
processor a sixth of what `alloc_from_pool(segment, …)` does (`bench/results/bookkeeping.md`): an op that is dispatched,
for the others. Both make a tensor of its own on the segment's storage.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memo_compile.codegen.emitted.body import DTYPE_BYTES

BYTES = "torch.uint8"
VIEWS = ("alloc_from_pool", "reinterpret_tensor")


@dataclass(frozen=True)
class Segment:
    """A segment of `size` bytes, taken as elements of `dtype` ("torch.float32")."""

    name: str
    size: int
    dtype: str = BYTES

    def taken(self, make: str) -> str:
        """The statement that allocates it by `make`, `empty_strided_DEVICE`."""
        return f"{self.name} = {make}(({self.size // _itemsize(self.dtype)}, ), (1, ), {self.dtype})"

    def view(self, offset: int, dtype: str, shape: str, stride: str) -> str:
        """The expression for a buffer at an offset in bytes."""
        if dtype == self.dtype and offset % _itemsize(dtype) == 0:
            return f"reinterpret_tensor({self.name}, {shape}, {stride}, {offset // _itemsize(dtype)})"
        return f"alloc_from_pool({self.name}, {offset}, {dtype}, {shape}, {stride})"


def common_dtype(size: int, dtypes: Iterable[str]) -> str:
    """The dtype of a segment of so many bytes for buffers of these.

    >>> common_dtype(64, ["torch.int64", "torch.bfloat16", "torch.bfloat16"]), common_dtype(63, ["torch.bfloat16"])
    ('torch.bfloat16', 'torch.uint8')
    """
    fitting = Counter(d for d in dtypes if _is_sized(d) and size % _itemsize(d) == 0)
    return next((dtype for dtype, _ in fitting.most_common(1)), BYTES)


@dataclass(frozen=True)
class View:
    """A view as it was read: `offset` in bytes, `dtype` by its name."""

    segment: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_view(value: ast.expr, dtypes: Mapping[str, str]) -> View | None:
    """The view of a segment that an expression makes; None for any other, such as a view of a buffer.

    Args:
        dtypes: the segments that were taken, and the dtype of each.
    """
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name) or value.func.id not in VIEWS:
        return None
    pool = value.args[0]
    if value.func.id == "alloc_from_pool":
        _, offset, dtype, shape, stride = value.args
        assert isinstance(pool, ast.Name)
        return View(pool.id, ast.literal_eval(offset), ast.unparse(dtype), *map(ast.literal_eval, (shape, stride)))
    if not isinstance(pool, ast.Name) or pool.id not in dtypes:
        return None
    shape, stride, start = map(ast.literal_eval, value.args[1:])
    return View(pool.id, start * _itemsize(dtypes[pool.id]), dtypes[pool.id], shape, stride)


def _is_sized(dtype: str) -> bool:
    return dtype.removeprefix("torch.") in DTYPE_BYTES


def _itemsize(dtype: str) -> int:
    return DTYPE_BYTES.get(dtype.removeprefix("torch."), 1)
