"""The Inductor wrapper that emits the arena: constant offsets in place of allocations.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `PythonWrapperCodegen.generate_return` is called when the body
of `call` is complete and has not been joined to the rest; `wrapper_call._lines` are its lines and `header` the
module's; `V.graph` knows the buffers. The wrapper class is swapped in for the time of one compilation. Tried with torch
2.13 alone: `define_subgraph_launcher_fn` is called with the text of a subgraph's function, whose graph is the last of
`codegened_graph_stack`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from memo_compile.codegen.emitted.body import Body, Inside, Kind, read_body
from memo_compile.codegen.emitted.numbers import check_growing, number_of, numbered, symbols_at_hand
from memo_compile.codegen.emitted.prefetch_buffers import prefetch_buffers_in, take_prefetch_buffer
from memo_compile.codegen.emitted.text import function_in, source_of
from memo_compile.codegen.emitted.views import Segment, common_dtype
from memo_compile.codegen.lowered import Lowered
from memo_compile.codegen.lowerings import register_lowerings
from memo_compile.codegen.scheduler.dependencies import held_buffers, views_of
from memo_compile.codegen.workspaces import workspaces_of
from memo_compile.logs import logger
from memo_compile.passes.fx.facts import schema_name_of
from memo_compile.placement.bounds import live_bytes
from memo_compile.schema import ArenaBuffer, ArenaSegment

log = logger(__name__)

# Called with the finished body. Returns the buffers and segments to emit; an empty pair leaves the text as it is.
Planner = Callable[[Body], tuple[Sequence[ArenaBuffer], Sequence[ArenaSegment]]]


@dataclass(frozen=True)
class Emission:
    """A graph's finished lines and what was read from them.

    `at_hand` is a context in which Inductor has the graph at hand; `reread` reads other lines in their place. `lowered`
    is what a dry run may be gone on with.
    """

    lines: tuple[str, ...]
    body: Body
    at_hand: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    outputs: tuple[str, ...] = ()
    device: str | None = None
    lowered: Lowered | None = None
    inside: Mapping[str, Inside] = field(default_factory=dict)

    def reread(self, lines: Sequence[str]) -> Body:
        """The body of the same graph with its lines in another order."""
        with self.at_hand():
            return _read(lines, self.outputs, self.device, self.inside)


# Called with what Inductor emitted. Returns the lines in the order in which they are to stand.
Arranger = Callable[[Emission], Sequence[str]]

# Called with the text that was emitted, the returned expressions and the inputs' names: a check of the result.
Inspector = Callable[[Sequence[str], Sequence[str], Sequence[str]], None]

# Called with the text that was emitted and inspected. Returns what the module imports for it, and the text to run.
Finisher = Callable[[Sequence[str]], tuple[Sequence[str], Sequence[str]]]


@dataclass(frozen=True)
class Hooks:
    """What is asked for each graph, in this order: its lines' order, its buffers' places, a check, the text to run.

    What lies on another device than `device` is not counted ("cuda:0"; by default the one on which most lies).
    """

    plan: Planner
    inspect: Inspector | None = None
    finish: Finisher | None = None
    arrange: Arranger | None = None
    device: str | None = None


_EMPTY = re.compile(r"^(?P<indent>\s*)(?P<name>\w+) = (?P<make>empty_strided_\w+)\((?P<args>.*)\)\s*(?:#.*)?$")


class BodyCaptured(BaseException):
    """Ends a dry run of Inductor once the body has been read. Not an `Exception`: nothing wraps it."""


@contextlib.contextmanager
def arena_wrapper(hooks: Hooks) -> Iterator[None]:
    """Within, every Inductor graph is emitted with the buffers that `hooks.plan` places in segments of an arena."""
    from torch._inductor.codegen.common import device_codegens, init_backend_registration  # loads Inductor

    init_backend_registration()
    register_lowerings()
    swapped = {device: codegen.wrapper_codegen for device, codegen in device_codegens.items()}
    try:
        for device, base in swapped.items():
            device_codegens[device].wrapper_codegen = _subclass(base, hooks)
        yield
    finally:
        for device, base in swapped.items():
            device_codegens[device].wrapper_codegen = base


def _subclass(base: Any, hooks: Hooks) -> Any:
    if not isinstance(base, type):
        return base

    class ArenaWrapper(base):
        asked, emitted = hooks, None

        @staticmethod
        def create(is_subgraph: bool, subgraph_name: Any, parent_wrapper: Any, partition_signatures: Any = None) -> Any:
            if is_subgraph:
                return base.create(is_subgraph, subgraph_name, parent_wrapper, partition_signatures)
            made = ArenaWrapper()
            made.inside = {}
            return made

        def define_subgraph_launcher_fn(self, name: str, subgraph_code: Any) -> None:
            super().define_subgraph_launcher_fn(name, subgraph_code)
            held = held_inside(self.codegened_graph_stack[-1], name, subgraph_code.value, self.asked.device)
            self.inside.update({} if held is None else {name: held})

        def go_on(self, asked: Hooks) -> None:
            """Ask something else of a body that a dry run ended at; called before it is generated once more."""
            self.asked, self.emitted = asked, list(self.wrapper_call._lines)
            self.lines.clear()

        def generate_return(self, output_refs: list[str]) -> None:
            hooks = self.asked
            if self.emitted is not None:
                self.wrapper_call._lines[:] = self.emitted
            lines = [line if isinstance(line, str) else _text(line) for line in self.wrapper_call._lines]
            kept = [line for line in lines if line is not None]
            symbols = symbols_at_hand()
            check_growing()
            body = _read(numbered(kept, symbols), output_refs, hooks.device, self.inside)
            if hooks.arrange is not None:
                shown = tuple(numbered(kept, symbols))
                emission = Emission(
                    lines=shown,
                    body=body,
                    at_hand=_at_hand(),
                    outputs=tuple(output_refs),
                    device=hooks.device,
                    inside=self.inside,
                )
                kept = list(hooks.arrange(emission))
                body = _read(kept, output_refs, hooks.device, self.inside)
                self.wrapper_call._lines[:] = kept
            buffers, segments = hooks.plan(body)
            if buffers:
                kept = rewrite(kept, buffers, segments)
                self.wrapper_call._lines[:] = kept
            if hooks.inspect is not None:
                hooks.inspect(numbered(kept, symbols), output_refs, _input_names())
            if hooks.finish is not None:
                imported, finished = hooks.finish(kept)
                self.header.splice("\n".join(imported))
                self.wrapper_call._lines[:] = finished
            super().generate_return(output_refs)

    return ArenaWrapper


def _at_hand() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Brings the present graph back when Inductor has left it."""
    from torch._inductor.virtualized import V  # loads Inductor

    graph = V.graph
    return lambda: V.set_graph_handler(graph)


def _text(line: Any) -> str | None:
    """A deferred line's text, or None where it emits nothing."""
    made = line() if callable(line) else None
    return made if isinstance(made, str) else None


def _input_names() -> list[str]:
    from torch._inductor.virtualized import V  # loads Inductor

    return list(V.graph.graph_input_names)


def held_inside(graph: Any, name: str, text: str, device: str | None) -> Inside | None:
    """What the function of a subgraph holds; None where the text is of no form that memo knows."""
    from torch._inductor.virtualized import V  # loads Inductor

    try:
        lines, outputs = function_in(text, name)
        with V.set_graph_handler(graph):
            body = _read(numbered(lines, symbols_at_hand()), outputs, device, {})
            given = [body.storages[n].end for n in graph.graph_input_names]
    except (SyntaxError, ValueError, LookupError):
        log.debug("%s: what it holds is taken from its graph", name, exc_info=True)
        return None
    ranges = [(s.start, s.end, s.bytes) for s in body.storages.values() if s.kind != Kind.INPUT]
    returned = {n for n in body.outputs if n is not None and body.storages[n].kind != Kind.INPUT}
    own = live_bytes(ranges, body.steps)
    return Inside(tuple(own), tuple(given), sum(body.storages[n].bytes for n in returned))


def _read(lines: Sequence[str], output_refs: Sequence[str], device: str | None, inside: Mapping[str, Inside]) -> Body:
    from torch._inductor.virtualized import V  # loads Inductor

    graph = V.graph

    def kernel_storage(name: str) -> tuple[Kind, int] | None:
        from torch._inductor import ir  # loads Inductor

        buffer = graph.name_to_buffer.get(name)
        if _schema_name(buffer) == "memo::host_lease":
            return Kind.KERNEL, 0
        if buffer is None:
            return None
        if device is not None and str(buffer.get_device()) != device:
            return Kind.KERNEL, 0
        onto = _schema_name(buffer) in ("memo::attention_onto_", "memo::attention_backward_onto_")
        if onto or isinstance(buffer.get_output_spec(), (ir.NoneLayout, ir.MultiOutputLayout)):
            return Kind.WORKSPACE, 0
        if isinstance(buffer, (ir.ExternKernelAlloc, ir.MultiOutput)) and not buffer.get_inputs_that_alias_output():
            return Kind.KERNEL, number_of(graph.get_allocation_storage_size(buffer)) * int(buffer.get_dtype().itemsize)
        return None

    body = read_body(
        source_of(lines),
        output_refs,
        _input_names(),
        kernel_storage,
        partial(views_of, graph),
        workspaces_of(graph),
        held=held_buffers(graph),
        device=device,
        inside=inside,
    )
    strides = tuple(_stride(output) for output in graph.graph_outputs)
    origins = {name: _origin(graph.name_to_buffer.get(name)) for name in body.storages}
    return replace(body, strides=strides, prefetch_buffers=tuple(prefetch_buffers_in(lines)), origins=origins)


def _origin(buffer: Any) -> str:
    """The name of the FX node whose value a buffer holds, "" where Inductor kept none."""
    node = buffer.get_origin_node() if buffer is not None and hasattr(buffer, "get_origin_node") else None
    return str(node.name) if node is not None else ""


def _schema_name(buffer: Any) -> str:
    """The op that makes a buffer, "" where that is none of torch's or memo's."""
    return schema_name_of(getattr(buffer, "op_overload", None))


def _stride(output: Any) -> tuple[int, ...] | None:
    """The strides that Inductor chose for an output; None for a scalar."""
    try:
        return tuple(int(s) for s in output.get_stride())
    except (AttributeError, NotImplementedError, TypeError):
        return None


def rewrite(lines: Sequence[str], buffers: Sequence[ArenaBuffer], segments: Sequence[ArenaSegment]) -> list[str]:
    """Replace the allocation lines of placed buffers by views into their segment.

    A segment is taken before its first buffer and its name dropped after its last: from then on its buffers alone
    hold it, and it is free when they are gone.
    """
    places = {b.name: b for b in buffers}
    prefetch_buffers = prefetch_buffers_in(lines)
    made = {m["name"]: m for m in map(_EMPTY.match, lines) if m and m["name"] in places}
    of_segment = {s.name: [b for b in buffers if b.segment == s.name] for s in segments}
    typed = {s.name: _typed(s, of_segment[s.name], made, prefetch_buffers) for s in segments}
    unborn = {name: len(inside) for name, inside in of_segment.items()}
    taken: set[str] = set()
    out: list[str] = []
    for line in lines:
        match = _EMPTY.match(line)
        place = places.get(match["name"]) if match else None
        if match is None or place is None:
            out.append(line)
            continue
        indent, segment = match["indent"], typed[place.segment]
        if segment.name not in taken:
            taken.add(segment.name)
            first = segment.taken(match["make"])
            if _alone_in_prefetch(of_segment[segment.name], prefetch_buffers):
                lease, offset = prefetch_buffers[match["name"]]
                first = take_prefetch_buffer(segment.name, segment.size, lease, offset, match["make"])
            out.append(f"{indent}{first}")
        shape, stride, dtype = split_arguments(match["args"])
        out.append(f"{indent}{match['name']} = {segment.view(place.offset, dtype, shape, stride)}")
        unborn[segment.name] -= 1
        if not unborn[segment.name]:
            out.append(f"{indent}del {segment.name}")
    return out


def _alone_in_prefetch(buffers: Sequence[ArenaBuffer], prefetch_buffers: Container[str]) -> bool:
    """Whether a segment holds nothing but what a slice is prefetched into."""
    return len(buffers) == 1 and buffers[0].name in prefetch_buffers


def _typed(
    segment: ArenaSegment,
    buffers: Sequence[ArenaBuffer],
    made: Mapping[str, re.Match[str]],
    prefetch_buffers: Container[str],
) -> Segment:
    """A segment with its dtype; one that a call before may have taken already is of bytes."""
    if _alone_in_prefetch(buffers, prefetch_buffers):
        return Segment(segment.name, segment.size)
    dtypes = [split_arguments(made[b.name]["args"])[2] for b in buffers if b.name in made]
    return Segment(segment.name, segment.size, common_dtype(segment.size, dtypes))


def split_arguments(text: str) -> list[str]:
    """Split an argument list at its top-level commas.

    >>> split_arguments("(2, 3), (3, 1), torch.float32")
    ['(2, 3)', '(3, 1)', 'torch.float32']
    """
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts
