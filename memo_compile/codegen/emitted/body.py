"""Reads the body that Inductor emitted for one graph: its statements, its storages, and who uses which when.

The emitted text is the one truth about order: fusion, reordering and in-place reuse have all happened. A step is one
statement. Names that share a storage (reuse, views, items of a kernel's results) are followed to it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_ALLOCATION = re.compile(r"^empty_strided_(cpu|cuda|xpu)$")
_ALIASES = frozenset({"reinterpret_tensor", "alloc_from_pool", "as_strided"})
DTYPE_BYTES = {
    "float64": 8,
    "int64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "uint16": 2,
}


@dataclass(frozen=True)
class Storage:
    """One storage of a body. `end` is one past the last statement that reads or writes it; `inputs` start at 0.

    kind: "allocated" (a line of the body makes it, so memo can place it), "kernel" (a fallback kernel makes its own
    output), "workspace" (a kernel's scratch) or "input" (the caller's).
    """

    name: str
    kind: str
    bytes: int
    start: int
    end: int


@dataclass(frozen=True)
class Body:
    """A graph's emitted body. `outputs[i]` is the storage of output i, or None where it is no tensor of this body.

    `landings` are the buffers in which slices land that come back from the host, in the order in which they start.
    `labels` names what each statement calls, for reports; `origins` the FX node that each storage holds.
    """

    steps: int
    storages: dict[str, Storage]
    outputs: tuple[str | None, ...]
    inputs: tuple[str, ...]
    strides: tuple[tuple[int, ...] | None, ...] = ()
    landings: tuple[str, ...] = ()
    labels: tuple[str, ...] = field(default=(), compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)


def dense_bytes(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes that a strided tensor spans.

    >>> dense_bytes((2, 3), (4, 1), 4)
    28
    """
    if any(s == 0 for s in shape):
        return 0
    return (1 + sum((s - 1) * t for s, t in zip(shape, stride, strict=True))) * itemsize


def allocation_of(call: ast.expr) -> int | None:
    """The bytes that `empty_strided_*(shape, stride, dtype)` asks for; None for any other expression."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not _ALLOCATION.match(call.func.id):
        return None
    shape = [int(v) for v in ast.literal_eval(call.args[0])]
    stride = [int(v) for v in ast.literal_eval(call.args[1])]
    dtype = call.args[2]
    assert isinstance(dtype, ast.Attribute)
    return dense_bytes(shape, stride, DTYPE_BYTES.get(dtype.attr, 1))


def read_body(
    source: str,
    outputs: Sequence[str],
    inputs: Sequence[str],
    kernel_storage: Callable[[str], tuple[str, int] | None],
    aliased_by: Callable[[str], Sequence[str]] = lambda _: (),
    taken_by: Callable[[Sequence[str], str], int] = lambda _, __: 0,
) -> Body:
    """Read a body.

    Args:
        source: the statements of Inductor's `call`, without its `return`.
        outputs: the returned expressions.
        inputs: names of the graph's inputs.
        kernel_storage: kind and bytes of what the kernel that makes a name allocates; None where that is nothing.
        aliased_by: names of the values whose storage a kernel's result is, or may be, a view of.
        taken_by: bytes that a call takes for itself, by the names of its results, and by what it calls.
    """
    statements = flatten(ast.parse(source).body)
    home: dict[str, str] = {name: name for name in inputs}  # name -> the storage it lies in
    kind: dict[str, str] = dict.fromkeys(inputs, "input")
    size: dict[str, int] = dict.fromkeys(inputs, 0)
    start: dict[str, int] = dict.fromkeys(inputs, 0)
    end: dict[str, int] = dict.fromkeys(inputs, 0)
    makers: dict[str, str] = {}  # of allocated storages: empty_strided_cuda and the like
    pinned: set[str] = set()  # storages that share a name with another one
    results: dict[str, str] = {}  # item -> the tuple it was taken from, which holds it as long as it has a name
    for step, statement in enumerate(statements):
        if isinstance(statement, ast.Delete):
            continue
        for name in _names(statement):
            if name in home:
                end[home[name]] = step + 1
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        target, value = statement.targets[0].id, statement.value
        source_name = alias_source(value)
        if (size_here := allocation_of(value)) is not None:
            kind[target], size[target] = "allocated", size_here
            makers[target] = ast.unparse(value).partition("(")[0]
        elif source_name is not None and source_name in home:
            # `buf6 = buf5[0]`, and `buf6 = buf5` where the kernel has one result: the storage is the result's.
            of_kernel = isinstance(value, ast.Subscript) or kind[home[source_name]] == "workspace"
            own = kernel_storage(target) if of_kernel else None
            if own is None:
                home[target] = home[source_name]
                continue
            kind[target], size[target] = own
            home[target], start[target], end[target] = target, start[home[source_name]], step + 1
            results[target] = home[source_name]
            continue  # an item of a kernel's results was made when the kernel ran
        elif views := [home[n] for n in aliased_by(target) if n in home]:
            # `buf3 = torch.ops.aten.view_as_complex.default(buf2)`: a view, though a kernel's call makes it.
            home[target] = views[0]
            pinned.update(views if len(set(views)) > 1 else ())
            continue
        elif isinstance(value, ast.Call):
            own = kernel_storage(target)
            aliased = _single_tensor_argument(value, home) if own is None else None
            if aliased is not None:
                home[target] = aliased
                continue
            kind[target], size[target] = own or ("kernel", 0)
        else:
            continue
        home[target], start[target], end[target] = target, step, step + 1
    out = []
    for expression in outputs:
        names = [n for n in _names(ast.parse(expression)) if n in home]
        out.append(home[names[0]] if names else None)
        if names:
            end[home[names[0]]] = len(statements)
    for name in _of_other_devices(makers, size):
        kind[name], size[name] = "kernel", 0
    for name in pinned:
        end[name] = len(statements)
    for item, whole in results.items():
        end[item] = max(end[item], end[whole])
    storages = {n: Storage(n, kind[n], size[n], start[n], end[n]) for n in kind}
    storages |= _workspaces(statements, taken_by)
    return Body(len(statements), storages, tuple(out), tuple(inputs), labels=tuple(map(_label, statements)))


def _workspaces(statements: Sequence[ast.stmt], taken_by: Callable[[Sequence[str], str], int]) -> dict[str, Storage]:
    """What calls take for themselves, each live while its statement runs; a loop or a choice is one statement."""
    found = {}
    for step, statement in enumerate(statements):
        within = list(ast.walk(statement))
        label = next((ast.unparse(n.func) for n in within if isinstance(n, ast.Call)), "")
        if not label:
            continue
        targets = [name for n in within if isinstance(n, ast.Assign) for t in n.targets for name in _names(t)]
        size = taken_by(list(dict.fromkeys(targets)), label)
        if size:
            name = f"{label}:{step}"
            found[name] = Storage(name, "workspace", size, step, step + 1)
    return found


def _of_other_devices(makers: Mapping[str, str], size: Mapping[str, int]) -> list[str]:
    """What lies on another device than most bytes do: a scalar on the host, say. It has no place in the arena."""
    total: dict[str, int] = {}
    for name, maker in makers.items():
        total[maker] = total.get(maker, 0) + size[name]
    main = max(total, key=lambda maker: total[maker], default="")
    return [name for name, maker in makers.items() if maker != main]


def _label(statement: ast.stmt) -> str:
    """What a statement calls; nothing where it only names or frees something."""
    value = getattr(statement, "value", None)
    return ast.unparse(value.func) if isinstance(value, ast.Call) else ""


def flatten(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Statements in order; the bodies of `with` blocks stand in line."""
    flat: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.With):
            flat.extend(flatten(statement.body))
        else:
            flat.append(statement)
    return flat


def _names(tree: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]


def alias_source(value: ast.expr) -> str | None:
    """The name whose storage an expression shares: `b`, `b[0]`, `reinterpret_tensor(b, …)`."""
    while isinstance(value, ast.Subscript):
        value = value.value
    if isinstance(value, ast.Name):
        return value.id
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _ALIASES:
        first = value.args[0]
        return first.id if isinstance(first, ast.Name) else None
    return None


def _single_tensor_argument(call: ast.Call, home: dict[str, str]) -> str | None:
    """The storage that a kernel's result may share when it owns none: that of the one tensor it is given."""
    storages = {home[n] for a in call.args for n in _names(a) if n in home}
    return next(iter(storages)) if len(storages) == 1 else None


def live_bytes(ranges: Sequence[tuple[int, int, int]], steps: int) -> list[int]:
    """Sum of bytes over time for (start, end, bytes) triples, one number for each step."""
    change = [0] * (steps + 1)
    for start, end, size in ranges:
        if end > start:
            change[start] += size
            change[min(end, steps)] -= size
    total, out = 0, []
    for step in range(steps):
        total += change[step]
        out.append(total)
    return out
