"""Checks emitted code for overlaps, from its text alone: it knows nothing of the layout that the text came from.

A region is the bytes of a view of a segment (`memo_compile.codegen.emitted.views`). It is live from the statement
that makes it to the last one that names it or an alias of it, and at least until its last name is deleted, since
Inductor knows readers that no text names. A saved region is live until the backward has read it. Values that are
passed to a line which memo does not know must not lie in a segment.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from memo_compile.codegen.emitted.body import DTYPE_BYTES, alias_source, allocation_of, dense_bytes
from memo_compile.codegen.emitted.known import is_known, is_known_block
from memo_compile.codegen.emitted.prefetch_buffers import prefetch_buffer_size
from memo_compile.codegen.emitted.views import View, read_view
from memo_compile.errors import PlacementOverlap


@dataclass(frozen=True)
class Region:
    """Bytes [offset, offset + size) of a segment, over the half-open range of statements [start, end)."""

    name: str
    segment: str
    offset: int
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class EmittedRegions:
    """The regions of one graph's text. `outputs[i]` is the name of output i's region, None where it has none.

    `results[i]` is the region or the input in which output i lies, None where it is neither. `inputs` gives, for each
    input, one past the last statement that needs it. `given` are the regions and inputs that are passed to a line which
    memo does not know, each with one such line.
    """

    steps: int
    regions: dict[str, Region]
    segments: dict[str, int]
    outputs: tuple[str | None, ...]
    inputs: dict[str, int]
    results: tuple[str | None, ...] = ()
    given: Mapping[str, str] = field(default_factory=dict)


def read_regions(lines: Sequence[str], outputs: Sequence[str], inputs: Sequence[str]) -> EmittedRegions:
    """Read a graph's emitted statements; `outputs` are the returned expressions, `inputs` the names it is given."""
    text = textwrap.dedent("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    statements = list(_statements(ast.parse(text).body))
    # Of the bytes that a name stands for: several where an op may share those of any of its arguments.
    owner: dict[str, tuple[str, ...]] = {name: (name,) for name in inputs}
    last = dict.fromkeys(inputs, 0)
    regions: dict[str, Region] = {}
    segments: dict[str, int] = {}
    dtypes: dict[str, str] = {}  # of segments
    deleted: dict[str, int] = {}
    given: dict[str, str] = {}  # what a line that memo does not know touches: name -> that line
    for step, (statement, known) in enumerate(statements):
        named = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        if isinstance(statement, ast.Delete):
            deleted.update(dict.fromkeys(named, step + 1))
            continue
        touched = [o for name in named for o in owner.get(name, ())]
        last.update(dict.fromkeys(touched, step + 1))
        given.update({} if known else dict.fromkeys(touched, ast.unparse(statement)))
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name, value = statement.targets[0].id, statement.value
        function = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
        if function.startswith("empty_strided") and name.startswith("memo_arena_"):
            assert isinstance(value, ast.Call)
            segments[name], dtypes[name] = allocation_of(value) or 0, ast.unparse(value.args[2])
        elif (size := prefetch_buffer_size(value)) is not None:
            segments[name] = size
        elif (view := read_view(value, dtypes)) is not None:
            regions[name] = _region(name, view, step)
            owner[name], last[name] = (name,), step + 1
        elif shared := tuple(o for source in _sources(value) for o in owner.get(source, ())):
            owner[name] = shared
    for name, owners in owner.items():
        last.update({o: max(last[o], deleted.get(name, len(statements))) for o in owners})
    ends = {name: replace(r, end=last[name]) for name, r in regions.items()}
    results = tuple(_owner_of(expression, owner) for expression in outputs)
    return EmittedRegions(
        steps=len(statements),
        regions={n: replace(r, end=len(statements)) if n in results else r for n, r in ends.items()},
        segments=segments,
        outputs=tuple(r if r in regions else None for r in results),
        inputs={name: last[name] for name in inputs},
        results=results,
        given=given,
    )


def _statements(body: Sequence[ast.stmt], known: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Each statement, in the order of `flatten`, and whether it and the blocks around it are known."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _statements(statement.body, known and is_known_block(statement))
        else:
            yield statement, known and is_known(statement)


def _region(name: str, view: View, step: int) -> Region:
    size = dense_bytes(view.shape, view.stride, DTYPE_BYTES.get(view.dtype.removeprefix("torch."), 1))
    return Region(name=name, segment=view.segment, offset=view.offset, size=size, start=step, end=step + 1)


def _sources(value: ast.expr) -> list[str]:
    """The names whose bytes an expression may stand for; of a call of torch's ops, those that its schema tells."""
    source = alias_source(value)
    if source is not None:
        return [source]
    schema = _schema_of(value)
    if schema is None or not any(r.alias_info is not None for r in schema.returns):
        return []
    assert isinstance(value, ast.Call)
    given = dict(zip((a.name for a in schema.arguments), value.args, strict=False))
    given |= {k.arg: k.value for k in value.keywords if k.arg is not None}
    shared = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.name in given]
    return [n.id for tree in shared for n in ast.walk(tree) if isinstance(n, ast.Name)]


def _schema_of(value: ast.expr) -> Any:
    """The schema of `torch.ops.namespace.op.overload(…)`; None for any other expression."""
    path = ast.unparse(value.func).split(".") if isinstance(value, ast.Call) else []
    if path[:2] != ["torch", "ops"] or len(path) != 5:
        return None
    op = getattr(getattr(getattr(torch.ops, path[2]), path[3]), path[4], None)
    return getattr(op, "_schema", None)


def _owner_of(expression: str, owner: Mapping[str, tuple[str, ...]]) -> str | None:
    names = [n.id for n in ast.walk(ast.parse(expression)) if isinstance(n, ast.Name) and n.id in owner]
    return owner[names[0]][0] if names else None


def verify_emitted(
    forward: EmittedRegions, backward: EmittedRegions | None = None, links: Sequence[tuple[int, str]] = ()
) -> None:
    """Check that no two regions that live at the same time share bytes, and that all lie within their segments.

    Outputs and gradients lie in none: they are the user's to keep, and would hold a whole segment.

    Args:
        links: pairs of a forward output's index and the name of the backward's input that receives it.

    Raises:
        PlacementOverlap: the emitted code would overwrite a value that is still needed.
    """
    _check(forward.regions.values(), forward.segments)
    _check_given(forward)
    if backward is None:
        return
    _check(backward.regions.values(), backward.segments)
    _check_given(backward, {received for index, received in links if forward.outputs[index] is not None})
    # A segment of the forward is another storage than one of the backward; what is handed on stays in its own.
    kept: dict[str, Region] = {}
    for index, received in links:
        name = forward.outputs[index]
        if name is not None:
            region = kept.get(name, forward.regions[name])
            kept[name] = replace(region, end=max(region.end, forward.steps + backward.inputs[received]))
    _check([kept.get(r.name, r) for r in forward.regions.values()], forward.segments)
    _check_results(forward, backward, links)


def _check_given(graph: EmittedRegions, inside: Collection[str] = ()) -> None:
    """`inside`: inputs of the graph that lie in the arena."""
    for name, line in graph.given.items():
        if name in graph.regions or name in inside:
            raise PlacementOverlap(f"{name} lies in the arena, and is given to what may keep it: {line}")


def _check_results(forward: EmittedRegions, backward: EmittedRegions, links: Sequence[tuple[int, str]]) -> None:
    handed = {index for index, _ in links}
    inside = {received for index, received in links if forward.outputs[index] is not None}
    results = [name for index, name in enumerate(forward.outputs) if index not in handed]
    results += [name for name in backward.results if name in backward.regions or name in inside]
    for name in results:
        if name is not None:
            raise PlacementOverlap(f"{name} is returned to the user and lies in the arena, which is used again")


def _check(regions: Iterable[Region], segments: Mapping[str, int]) -> None:
    active: dict[str, list[Region]] = {}
    for region in sorted(regions, key=lambda r: (r.start, r.name)):
        if region.segment not in segments:
            raise PlacementOverlap(f"{region.name} lies in {region.segment}, which the emitted code never takes")
        if region.offset < 0 or region.offset + region.size > segments[region.segment]:
            raise PlacementOverlap(
                f"{region.name} takes bytes [{region.offset}, {region.offset + region.size}) of {region.segment}, "
                f"which has {segments[region.segment]}"
            )
        others = [r for r in active.get(region.segment, ()) if r.end > region.start]
        for other in others:
            if other.offset < region.offset + region.size and region.offset < other.offset + other.size:
                raise PlacementOverlap(
                    f"{region.name} is written to bytes [{region.offset}, {region.offset + region.size}) of "
                    f"{region.segment} while {other.name} still lies at [{other.offset}, {other.offset + other.size})"
                )
        active[region.segment] = [*others, region]
