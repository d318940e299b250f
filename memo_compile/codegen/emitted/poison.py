"""Adds fills to emitted text, for `verify="poison"`: what must not be read any more, or not yet, is no number.

A segment is filled when it is taken, a buffer's bytes after the last statement of its life, as the layout has it. The
text is what `rewrite` made; its statements are those of the layout, less the lines that take and drop segments.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from memo_compile.codegen.emitted.text import PREFETCH_BUFFER, WAIT, statements_of
from memo_compile.codegen.emitted.views import VIEWS
from memo_compile.schema import ArenaBuffer, ArenaSegment

IMPORT = "from memo_compile.runtime.poison import kept_bytes, poison, poison_host, poisoned_prefetch_buffer"
_SEGMENT = re.compile(r"^\s*(?P<name>memo_arena_\d+) = (?P<maker>[\w.]+)\(")
_BUFFER = re.compile(rf"^\s*(?P<name>\w+) = (?:{'|'.join(VIEWS)})\(memo_arena_\d+, ")


@dataclass(frozen=True)
class Kept:
    """A buffer of the forward that the backward receives as `name`; its life ends after `end` statements there."""

    name: str
    segment: int
    offset: int
    size: int
    end: int


def kept_for_backward(
    buffers: Sequence[ArenaBuffer],
    segments: Sequence[ArenaSegment],
    forward_steps: int,
    received: Mapping[str, str],
) -> list[Kept]:
    """What the backward is to fill of the forward's buffers; `received` names the backward input that holds each."""
    sizes = {s.name: s.size for s in segments}
    return [
        Kept(
            name=received[b.name],
            segment=sizes[b.segment],
            offset=b.offset,
            size=b.size,
            end=b.end - forward_steps,
        )
        for b in buffers
        if b.name in received and b.end > forward_steps
    ]


def poisoned(lines: Sequence[str], buffers: Sequence[ArenaBuffer], first: int, kept: Sequence[Kept] = ()) -> list[str]:
    """The text with fills.

    Args:
        lines: a graph's emitted statements, its buffers placed.
        buffers: those that this text makes.
        first: the step of the timeline at which its first statement stands.
        kept: what it receives and is the last to read.
    """
    text = [part for line in lines for part in line.split("\n")]
    last, waits = _last_lines(text), _last_waits(text)
    before: dict[int, list[str]] = defaultdict(list)
    after: dict[int, list[str]] = defaultdict(list)
    for number, (at, bytes_of, end) in enumerate(_lives(text, buffers, first, kept)):
        if end <= len(last):  # what lives on is the backward's to fill
            view = f"memo_poison_{number}"
            before[at].append(f"{view} = {bytes_of}")
            after[last[max(end, 1) - 1]] += [f"poison({view})", f"del {view}"]
    out: list[str] = []
    for i, line in enumerate(text):
        indent = line[: len(line) - len(line.lstrip())]
        out += [indent + more for more in before[i]]
        out.append(line.replace(PREFETCH_BUFFER, "poisoned_prefetch_buffer"))
        filled = _fill_of(line) if i in waits or not line.lstrip().startswith(WAIT) else []
        out += [indent + more for more in (*filled, *after[i])]
    return out


def _lives(
    text: Sequence[str], buffers: Sequence[ArenaBuffer], first: int, kept: Sequence[Kept]
) -> Iterator[tuple[int, str, int]]:
    """Of each buffer: the line before which its bytes can be named, how, and after how many statements it dies."""
    made = {m["name"]: i for i, m in enumerate(map(_BUFFER.match, text)) if m}
    for k in kept:
        yield 0, f"kept_bytes({k.name}, {k.segment}, {k.offset}, {k.size})", k.end
    for b in buffers:
        view = f"alloc_from_pool({b.segment}, {b.offset}, torch.uint8, ({b.size}, ), (1, ))"
        yield made[b.name], view, b.end - first


def _fill_of(line: str) -> list[str]:
    """What is filled after a line whatever lives: a segment that was taken, a slice that has come back."""
    taken = _SEGMENT.match(line)
    if taken is not None and taken["maker"] != PREFETCH_BUFFER:
        return [f"poison({taken['name']})"]
    return [line.strip().replace(WAIT, "poison_host")] if line.lstrip().startswith(WAIT) else []


def _last_waits(text: Sequence[str]) -> frozenset[int]:
    """Of each slice that comes back, once or more often, the line that waits for it last: then the host's is unused."""
    last: dict[str, int] = {}
    for i, line in enumerate(text):
        if line.lstrip().startswith(WAIT):
            (statement,) = statements_of([line])
            assert isinstance(statement, ast.Expr)
            assert isinstance(statement.value, ast.Call)
            last[", ".join(map(ast.unparse, statement.value.args[1:]))] = i
    return frozenset(last.values())


def _last_lines(text: Sequence[str]) -> list[int]:
    """The last line of each statement, in the layout's numbers."""
    return [(s.end_lineno or s.lineno) - 1 for s in statements_of(text) if not _of_segment(s)]


def _of_segment(statement: ast.stmt) -> bool:
    """Whether a statement takes or drops a segment: it is none of Inductor's."""
    if isinstance(statement, (ast.Assign, ast.Delete)):
        return any(isinstance(t, ast.Name) and t.id.startswith("memo_arena_") for t in statement.targets)
    return False
