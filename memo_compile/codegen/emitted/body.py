"""Reads the body that Inductor emitted for one graph: its statements, its storages, and who uses which when.

The emitted text is the one truth about order: fusion, reordering and in-place reuse have all happened. A step is one
statement. Names that share a storage (reuse, views, items of a kernel's results) are followed to it.

A storage lives until the last statement that names it, and at least until Inductor deletes its last name: `del` stands
where the scheduler has seen the last of a buffer's readers and writers, some of whom no text names (the wait for a
collective reads what was sent). What is never deleted lives to the end. Of what a line touches that memo does not know,
nobody can say how long it is needed (`memo_compile.codegen.emitted.known`): torch's allocator keeps it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from memo_compile.codegen.emitted.known import device_of, is_known, is_known_block

_ALLOCATION = re.compile(r"^empty_strided_(cpu|cuda|xpu)$")
_ALIASES = frozenset({"reinterpret_tensor", "alloc_from_pool", "as_strided", "copy_if_misaligned"})
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


class Kind(StrEnum):
    """Who makes a storage, and so whether memo can place it."""

    ALLOCATED = "allocated"  # a line of the body: memo can place it
    HELD = "held"  # so too, but something that memo does not know may keep it
    KERNEL = "kernel"  # a fallback kernel, as its own output
    WORKSPACE = "workspace"  # a kernel, as scratch
    INPUT = "input"  # the caller


@dataclass(frozen=True)
class Storage:
    """One storage of a body. `end` is one past the last statement that needs it; inputs start at 0."""

    name: str
    kind: Kind
    bytes: int
    start: int
    end: int


@dataclass(frozen=True)
class Body:
    """A graph's emitted body. `outputs[i]` is the storage of output i, or None where it is no tensor of this body.

    `held` are storages that something may keep which memo does not know, inputs among them. `prefetch_buffers` are
    those into which slices are prefetched, in the order in which they start.
    `labels` names what each statement calls, for reports; `origins` the FX node that each storage holds.
    """

    steps: int
    storages: dict[str, Storage]
    outputs: tuple[str | None, ...]
    inputs: tuple[str, ...]
    strides: tuple[tuple[int, ...] | None, ...] = ()
    prefetch_buffers: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    labels: tuple[str, ...] = field(default=(), compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Inside:
    """What the function of a subgraph holds while it runs.

    Attributes:
        own: bytes that it has allocated, at each of its statements.
        ends: for each value that it is given one past the statement that needs it last.
        results: bytes of what it returns, as far as it has made that itself.
    """

    own: tuple[int, ...]
    ends: tuple[int, ...]
    results: int

    def beyond(self, given: Sequence[int]) -> int:
        """The most bytes beyond its results; of what it is given, so many bytes each count until it lets go of them."""
        pairs = list(zip(given, self.ends, strict=False))
        held = (own + sum(size for size, end in pairs if step < end) for step, own in enumerate(self.own))
        return max(0, max(held, default=0) - self.results)


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
    kernel_storage: Callable[[str], tuple[Kind, int] | None],
    aliased_by: Callable[[str], Sequence[str]] = lambda _: (),
    taken_by: Callable[[Sequence[str], str], int] = lambda _, __: 0,
    held: Collection[str] = (),
    device: str | None = None,
    inside: Mapping[str, Inside] | None = None,
) -> Body:
    """Read a body.

    Args:
        source: the statements of Inductor's `call`, without its `return`.
        outputs: the returned expressions.
        inputs: names of the graph's inputs.
        kernel_storage: kind and bytes of what the kernel that makes a name allocates; None where that is nothing.
        aliased_by: names of the values whose storage a kernel's result is, or may be, a view of.
        taken_by: bytes that a call takes for itself, by the names of its results, and by what it calls.
        held: names of buffers that Inductor gives to what memo does not know, whatever the text shows.
        device: where buffers are to be placed, "cpu" or "cuda:0"; by default where most bytes lie.
        inside: what the functions of subgraphs hold, by name.
    """
    lines = list(_lines(ast.parse(source).body))
    reading = _Reading(kernel_storage, aliased_by, len(lines))
    for name in inputs:
        reading.add(name, Kind.INPUT, 0, 0)
    for step, line in enumerate(lines):
        reading.read(step, line)
    returned = [reading.returned(expression) for expression in outputs]
    body = reading.body(lines, returned, inputs, held, device)
    statements = [line.statement for line in lines]
    handed_over = {
        step: _handed_over(body, step, reading.lists.get(call.args[0].id, []))
        for step, call in _calls_with_lists(statements)
    }
    scratch = _workspaces(statements, taken_by, inside or {}, handed_over)
    gone = {s.name: replace(s, end=step) for step, given in handed_over.items() for s in given if s is not None}
    return replace(body, storages=body.storages | gone | scratch)


@dataclass(frozen=True)
class _Line:
    """A statement, the device that is current there, and whether its block and itself are of known forms."""

    statement: ast.stmt
    device: str | None
    known: bool


def _lines(body: Sequence[ast.stmt], device: str | None = None, known: bool = True) -> Iterator[_Line]:
    """Statements in the order of `flatten`."""
    for statement in body:
        if isinstance(statement, ast.With):
            inside = device_of(statement) or device
            yield from _lines(statement.body, inside, known and is_known_block(statement))
        else:
            yield _Line(statement, device, known and is_known(statement))


@dataclass
class _Reading:
    """What has been read of a body so far. `storage_of` leads from a name to the storage that it lies in."""

    kernel_storage: Callable[[str], tuple[Kind, int] | None]
    aliased_by: Callable[[str], Sequence[str]]
    steps: int
    storage_of: dict[str, str] = field(default_factory=dict)
    kind: dict[str, Kind] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # devices of allocated storages
    results: dict[str, str] = field(default_factory=dict)  # item -> the tuple that holds it as long as it has a name
    deleted: dict[str, int] = field(default_factory=dict)  # name -> one past the statement that deletes it
    held: set[str] = field(default_factory=set)
    lists: dict[str, list[list[str]]] = field(default_factory=dict)  # what a subgraph is called with, until it has run

    def add(self, name: str, kind: Kind, size: int, start: int) -> None:
        """A storage of its own."""
        self.kind[name], self.size[name] = kind, size
        self.storage_of[name], self.start[name], self.end[name] = name, start, start

    def storages_in(self, tree: ast.AST) -> list[str]:
        """The storages that an expression or a statement names."""
        return [self.storage_of[name] for name in _names(tree) if name in self.storage_of]

    def read(self, step: int, line: _Line) -> None:
        """Take in the next statement."""
        statement = line.statement
        if isinstance(statement, ast.Delete):
            self.deleted.update((name, step + 1) for name in _names(statement))
            return
        if not line.known:
            self.held.update(self.storages_in(statement))
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            self._assign(step, statement.targets[0].id, statement.value, line.device)
        listed = [s for name in _names(statement) for given in self.lists.get(name, ()) for s in given]
        for name in [*self.storages_in(statement), *listed]:
            self.end[name] = step + 1

    def _assign(self, step: int, target: str, value: ast.expr, device: str | None) -> None:
        source = alias_source(value)
        shared = [self.storage_of[name] for name in self.aliased_by(target) if name in self.storage_of]
        if (size := allocation_of(value)) is not None:
            self.add(target, Kind.ALLOCATED, size, step)
            self.places[target] = _place_of(value, device)
        elif source is not None and source in self.storage_of and not shared:
            self._name(target, self.storage_of[source], isinstance(value, ast.Subscript))
        elif shared:
            # `buf3 = torch.ops.aten.view_as_complex.default(buf2)`: a view, though a kernel's call makes it.
            self.storage_of[target] = shared[0]
            self.held.update(shared if len(set(shared)) > 1 else ())
        elif isinstance(value, ast.List):
            self.lists[target] = [self.storages_in(element) for element in value.elts]
            self.held.update(self.storages_in(value))
            self.add(target, Kind.KERNEL, 0, step)
        elif isinstance(value, (ast.Call, ast.BinOp)):  # `[None] * 2`, which a branch fills
            self._made(step, target, value)

    def _name(self, target: str, whole: str, is_item: bool) -> None:
        """`buf6 = buf5[0]`, and `buf6 = buf5` where the kernel has one result: the storage is the result's."""
        own = self.kernel_storage(target) if is_item or self.kind[whole] == Kind.WORKSPACE else None
        if own is None:
            self.storage_of[target] = whole
            return
        self.add(target, *own, self.start[whole])  # an item of a kernel's results was made when the kernel ran
        self.results[target] = whole

    def _made(self, step: int, target: str, value: ast.expr) -> None:
        own = self.kernel_storage(target)
        given = set(self.storages_in(value))
        if own is None and len(given) == 1:  # it owns no storage: that of the one tensor it is given
            self.storage_of[target] = next(iter(given))
            return
        if own is None and not _is_number(value):
            self.held.update(given)
        self.add(target, *(own or (Kind.KERNEL, 0)), step)

    def returned(self, expression: str) -> str | None:
        """The storage of an output, which lives to the end."""
        named = self.storages_in(ast.parse(expression))
        if not named:
            return None
        self.end[named[0]] = self.steps
        return named[0]

    def body(
        self,
        lines: Sequence[_Line],
        outputs: Sequence[str | None],
        inputs: Sequence[str],
        held: Collection[str],
        device: str | None,
    ) -> Body:
        """All of it."""
        self.held.update(self.storage_of[name] for name in held if name in self.storage_of)
        self._hold_until_deleted()
        for name in _elsewhere(self.places, self.size, device):
            self.kind[name], self.size[name] = Kind.KERNEL, 0
        for name in self.held:
            self.kind[name] = Kind.HELD if self.kind[name] == Kind.ALLOCATED else self.kind[name]
        storages = {
            n: Storage(name=n, kind=self.kind[n], bytes=self.size[n], start=self.start[n], end=self.end[n])
            for n in self.kind
        }
        labels = tuple(_label(line.statement) for line in lines)
        return Body(self.steps, storages, tuple(outputs), tuple(inputs), held=tuple(sorted(self.held)), labels=labels)

    def _hold_until_deleted(self) -> None:
        for name, storage in self.storage_of.items():
            if self.kind[storage] != Kind.WORKSPACE:  # scratch goes when the kernel returns
                self.end[storage] = max(self.end[storage], self.deleted.get(name, self.steps))
        for item, whole in self.results.items():
            self.end[item] = max(self.end[item], self.end[whole], self.deleted.get(whole, self.steps))


def _calls_with_lists(statements: Sequence[ast.stmt]) -> Iterator[tuple[int, Any]]:
    """Statements that do no more than to call a function with a list that has a name, as Inductor calls subgraphs."""
    for step, statement in enumerate(statements):
        call = statement.value if isinstance(statement, ast.Assign) else None
        if isinstance(call, ast.Call) and len(call.args) == 1 and isinstance(call.args[0], ast.Name):
            yield step, call


def _handed_over(body: Body, step: int, given: Sequence[Sequence[str]]) -> list[Storage | None]:
    """Of what a subgraph is given, each storage that nothing else needs, where it is given first; None in other places.

    What the caller of the graph has given is its own.
    """
    seen: set[str] = set()
    found: list[Storage | None] = []
    for names in given:
        storage = body.storages[names[0]] if len(names) == 1 else None
        own = storage is not None and storage.kind != Kind.INPUT and storage.end == step + 1
        found.append(storage if own and names[0] not in seen else None)
        seen.update(names)
    return found


def _workspaces(
    statements: Sequence[ast.stmt],
    taken_by: Callable[[Sequence[str], str], int],
    inside: Mapping[str, Inside],
    handed_over: Mapping[int, Sequence[Storage | None]],
) -> dict[str, Storage]:
    """What calls take for themselves, each live while its statement runs; a loop or a choice is one statement."""
    found = {}
    for step, statement in enumerate(statements):
        within = list(ast.walk(statement))
        label = next((ast.unparse(n.func) for n in within if isinstance(n, ast.Call)), "")
        if not label:
            continue
        targets = [name for n in within if isinstance(n, ast.Assign) for t in n.targets for name in _names(t)]
        given = [0 if s is None else s.bytes for s in handed_over.get(step, ())]
        functions = [n.func.id for n in within if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        known = [inside[name].beyond(given) for name in functions if name in inside]
        # The text tells all of a subgraph that is called here, and not of what is called round after round.
        exact = isinstance(statement, ast.Assign) and known
        size = max(known, default=0) if exact else max([taken_by(list(dict.fromkeys(targets)), label), *known])
        if size:
            name = f"{label}:{step}"
            found[name] = Storage(name=name, kind=Kind.WORKSPACE, bytes=size, start=step, end=step + 1)
    return found


def _place_of(allocation: ast.expr, device: str | None) -> str:
    """The device of `empty_strided_cuda(…)` where `device` is the current one."""
    kind = ast.unparse(allocation).partition("(")[0].rsplit("_", 1)[1]
    return device if device is not None and device.startswith(f"{kind}:") else kind


def _elsewhere(places: Mapping[str, str], size: Mapping[str, int], device: str | None) -> list[str]:
    """What lies on another device: a scalar on the host, say. It has no place in the arena."""
    total: dict[str, int] = {}
    for name, place in places.items():
        total[place] = total.get(place, 0) + size[name]
    main = device or max(total, key=lambda place: total[place], default="")
    return [name for name, place in places.items() if place not in (main, main.partition(":")[0])]


def _is_number(value: ast.expr) -> bool:
    """Whether an expression makes no tensor: `buf0.item()`."""
    called = value.func if isinstance(value, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr in ("item", "size", "stride")


def _label(statement: ast.stmt) -> str:
    """What a statement calls; nothing where it only names or frees something."""
    value = getattr(statement, "value", None)
    return ast.unparse(value.func) if isinstance(value, ast.Call) else ""


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
