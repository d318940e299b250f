"""Lets transfers of emitted code overlap with computation wherever that raises no peak, and replays an emitted order.

A plan that holds the least memory starts each prefetch where it is needed and waits for each offload after the last
reader. Most of the time clearly less is live than at the worst moment: there a prefetch may start earlier, by as much
as its link needs, and an offload be waited for later. What is live is read from the emitted statements, so that the
worst moment stays the worst. Lines move, nothing else changes; the layout and the verifier see what came of it.

`replay` plays emitted lines on three streams: computation, and one copy engine each way.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from memo_compile.codegen.emitted.body import DTYPE_BYTES, Body, Kind, alias_source, allocation_of
from memo_compile.codegen.emitted.text import TransferOp, memo_op, statements_of, transfer_op
from memo_compile.placement.bounds import live_bytes

SWEEPS = 4  # over the prefetches: each may move on once the one before it has moved


class LineKind(StrEnum):
    """What a line does: a transfer, under the name of its op; an allocation; dropping names; anything else.

    Across what is FIXED nothing moves.
    """

    OFFLOAD = TransferOp.OFFLOAD
    OFFLOAD_WAIT = TransferOp.OFFLOAD_WAIT
    PREFETCH = TransferOp.PREFETCH
    WAIT = TransferOp.WAIT
    EMPTY = "empty"
    DELETE = "delete"
    FIXED = "fixed"
    OTHER = ""


@dataclass(frozen=True)
class Rates:
    """Bytes a second to the host and back."""

    d2h: float
    h2d: float


@dataclass(frozen=True)
class Line:
    """One line of emitted code.

    A transfer is of `bytes` at host offset `at`, to or from the buffer `buffer`; an allocation is of `buffer`.

    names: what it mentions. binds: what it gives a meaning to. statements: how many it has. seconds: what it computes.
    """

    text: str
    kind: LineKind = LineKind.OTHER
    names: frozenset[str] = frozenset()
    binds: frozenset[str] = frozenset()
    statements: int = 1
    buffer: str = ""
    at: int = 0
    bytes: int = 0
    seconds: float = 0.0


def read_lines(lines: Sequence[str], itemsize: Mapping[str, int], seconds: Sequence[float]) -> list[Line] | None:
    """Each line of a body by itself; None where a statement spans several, so that none can be moved.

    Args:
        itemsize: bytes of an element of what a name stands for, where it is not allocated in the body.
        seconds: what each line computes.
    """
    known = dict(itemsize)
    sizes: dict[str, int] = {}
    out = []
    for text, cost in zip(lines, seconds, strict=True):
        try:
            line = _read(text, known, sizes)
        except SyntaxError:
            return None
        out.append(replace(line, seconds=cost))
    return out


def _read(text: str, itemsize: dict[str, int], sizes: dict[str, int]) -> Line:
    if text.lstrip().startswith("with "):
        return Line(text, LineKind.FIXED, statements=0)
    statements = statements_of([text])
    names = frozenset(n.id for s in statements for n in ast.walk(s) if isinstance(n, ast.Name))
    targets = [t for s in statements if isinstance(s, ast.Assign) for t in s.targets]
    binds = frozenset(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
    plain = Line(text, names=names, binds=binds, statements=len(statements))
    if statements and all(isinstance(s, ast.Delete) for s in statements):
        return replace(plain, kind=LineKind.DELETE)
    value = getattr(statements[0], "value", None) if len(statements) == 1 else None
    if not isinstance(value, ast.Call):
        return plain
    function = ast.unparse(value.func)
    if function.endswith("set_device"):
        return replace(plain, kind=LineKind.FIXED)
    size = allocation_of(value)
    if size is not None and len(binds) == 1:
        (name,) = binds
        itemsize[name], sizes[name] = DTYPE_BYTES.get(ast.unparse(value.args[2]).rsplit(".", 1)[-1], 1), size
        return replace(plain, kind=LineKind.EMPTY, buffer=name, bytes=size)
    moves = transfer_op(memo_op(value))
    if moves is None:
        return plain
    buffer, at = alias_source(value.args[0]) or "", int(ast.literal_eval(value.args[2]))
    return replace(
        plain, kind=LineKind(moves), buffer=buffer, at=at, bytes=_moved(value.args[0], buffer, itemsize, sizes)
    )


def _moved(value: ast.expr, buffer: str, itemsize: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Bytes of what a transfer names: all of a buffer, or the elements of a view of it."""
    if not isinstance(value, ast.Call):
        return sizes.get(buffer, 0)
    return math.prod(int(s) for s in ast.literal_eval(value.args[1])) * itemsize.get(buffer, 1)


def replay(lines: Sequence[Line], rates: Rates) -> float:
    """Seconds that the lines take on three streams; it is over when nothing is left to copy."""
    now = out_free = back_free = 0.0
    ends: dict[tuple[LineKind, int, str], float] = {}
    for line in lines:
        if line.kind is LineKind.OFFLOAD:
            ends[LineKind.OFFLOAD_WAIT, line.at, line.buffer] = out_free = max(now, out_free) + line.bytes / rates.d2h
        elif line.kind is LineKind.PREFETCH:
            ends[LineKind.WAIT, line.at, line.buffer] = back_free = max(now, back_free) + line.bytes / rates.h2d
        elif line.kind in (LineKind.OFFLOAD_WAIT, LineKind.WAIT):
            now = max(now, ends.get((line.kind, line.at, line.buffer), now))
        now += line.seconds
    return max(now, out_free, back_free)


def live_at(lines: Sequence[Line], body: Body, owned: Mapping[str, int]) -> list[int]:
    """Bytes live while each line runs.

    Args:
        body: what the same lines hold.
        owned: bytes of inputs that are free once the body has read them, by name.
    """
    ranges = [(s.start, s.end, s.bytes) for s in body.storages.values() if s.kind != Kind.INPUT]
    ranges += [(0, max(1, body.storages[n].end), size) for n, size in owned.items() if n in body.storages]
    live, out, step = [*live_bytes(ranges, body.steps), 0], [], 0
    for line in lines:
        out.append(max(live[step : step + max(1, line.statements)]))
        step += line.statements
    return out


@dataclass(frozen=True)
class _Place:
    """A line, when it begins where nothing waits, and what is live there."""

    line: Line
    begins: float
    live: int


def overlapped(lines: Sequence[Line], live: Sequence[int], rates: Rates, most: int = 0) -> list[Line]:
    """The lines with waits for offloads later and prefetches earlier, within the most that is live already.

    Args:
        live: bytes live at each line.
        most: bytes that may be live in any case, as the other graph of the step holds as much.
    """
    begins = itertools.accumulate((line.seconds for line in lines), initial=0.0)
    places = [_Place(*of) for of in zip(lines, begins, live, strict=False)]
    most = max(most, *live, 0)
    sizes = {line.buffer: line.bytes for line in lines if line.kind is LineKind.EMPTY}
    _wait_later(places, _copies_end(places, rates), sizes, most)
    wanted = _wanted_starts(places, rates)
    for _ in range(SWEEPS):
        if not _start_earlier(places, wanted, sizes, most):
            break
    return [place.line for place in places]


def _wait_later(places: list[_Place], done: Mapping[int, float], sizes: Mapping[str, int], most: int) -> None:
    """Move each wait for an offload to where its copy has ended, as far as there is room and nobody needs the bytes."""
    for at in reversed(range(len(places))):
        wait = places[at].line
        if wait.kind is not LineKind.OFFLOAD_WAIT or wait.buffer not in sizes:
            continue
        names = _aliases(places, wait.buffer)
        needed_anyway = any(p.line.names & names and p.line.kind is not LineKind.DELETE for p in places[at + 1 :])
        size = 0 if needed_anyway else sizes[wait.buffer]
        to = at + 1
        while to < len(places) and places[to].begins < done.get(wait.at, 0.0):
            line = places[to].line
            named = bool(line.names & names) and line.kind is not LineKind.DELETE
            if named or line.kind is LineKind.FIXED or places[to].live + size > most:
                break
            to += 1
        group = [
            at,
            *(i for i in range(at + 1, to) if places[i].line.kind is LineKind.DELETE and places[i].line.names & names),
        ]
        _regroup(places, at, to, group, size, last=True)


def _start_earlier(places: list[_Place], wanted: Mapping[str, float], sizes: Mapping[str, int], most: int) -> bool:
    """Move each prefetch to where its link needs it to start, as far as there is room; whether any has moved."""
    moved = False
    for at, place in enumerate(list(places)):
        prefetch = place.line
        if prefetch.kind is not LineKind.PREFETCH or prefetch.buffer not in sizes:
            continue
        names, size, target, to = _aliases(places, prefetch.buffer), sizes[prefetch.buffer], at, at
        while to > 0 and places[to].begins > wanted.get(prefetch.text, 0.0):
            before = places[to - 1]
            makes_room = before.line.kind is LineKind.EMPTY and before.line.buffer == prefetch.buffer
            if before.line.kind in (LineKind.PREFETCH, LineKind.FIXED) or (
                before.line.names & names and not makes_room
            ):
                break
            if not makes_room and before.line.binds & prefetch.names:
                break
            if target < at and before.live + size > most:
                break
            to -= 1
            target = to if makes_room else target
        if to < at and to != target:
            group = [at] if target == at else [target, at]
            _regroup(places, to, at + 1, group, 0 if target == at else size, last=False)
            moved = True
    return moved


def _regroup(places: list[_Place], start: int, end: int, group: list[int], size: int, *, last: bool) -> None:
    """Take the places of a group to the end of [start, end), or to its beginning; the others hold `size` more.

    Between the two lines of a prefetch's group its prefetch buffer is held already.
    """
    others = [i for i in range(start, end) if i not in group]
    if not others:
        return
    held_already = group[0] if not last else end
    rest = [replace(places[i], live=places[i].live + (size if i < held_already else 0)) for i in others]
    beside = rest[-1] if last else rest[0]
    taken = [replace(places[i], begins=beside.begins, live=beside.live) for i in group]
    places[start:end] = [*rest, *taken] if last else [*taken, *rest]


def _aliases(places: Sequence[_Place], name: str) -> frozenset[str]:
    """Names that may stand for the bytes of a buffer: its own, and what lines that mention one of them bind."""
    found = frozenset({name})
    for place in places:
        if place.line.names & found:
            found |= place.line.binds
    return found


def _wanted_starts(places: Sequence[_Place], rates: Rates) -> dict[str, float]:
    """When each prefetch has to start so that the link serves all of them in time, by its text: the last first."""
    waits: dict[tuple[int, str], float] = {}  # a slice may come several times
    free, starts = math.inf, dict[str, float]()
    for place in reversed(places):
        if place.line.kind is LineKind.WAIT:
            waits[place.line.at, place.line.buffer] = place.begins
        elif place.line.kind is LineKind.PREFETCH:
            free = min(waits.get((place.line.at, place.line.buffer), math.inf), free) - place.line.bytes / rates.h2d
            starts[place.line.text] = free
    return starts


def _copies_end(places: Sequence[_Place], rates: Rates) -> dict[int, float]:
    """When the copy of each offload has ended, by host offset."""
    free, ends = 0.0, {}
    for place in places:
        if place.line.kind is LineKind.OFFLOAD:
            free = max(place.begins, free) + place.line.bytes / rates.d2h
            ends[place.line.at] = free
    return ends
