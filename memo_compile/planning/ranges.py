"""One plan for a range of lengths: made at its upper end, where memory is shortest, and carried out in symbols.

Ends of ranges are powers of two, so that the number of compilations grows with the logarithm of the longest length.
Sizes that grow with the length fit wherever the largest fits; rows of slices are fractions of the length. A range ends
below where a slice would have fewer than two rows: there another one begins.

Private torch API, tried with torch 2.13: `ShapeEnv.guards` and `var_to_sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.fx as fx

from memo_compile.errors import BudgetTooSmall
from memo_compile.passes.analysis.token_axis import TokenAxis
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.fx.ranges import NoRange, number_at, twin_at
from memo_compile.passes.fx.sizes import bounded, is_symbolic, largest, seen, sizes_of, symbols_of
from memo_compile.passes.transforms.homes import Homes
from memo_compile.passes.transforms.partition import Split
from memo_compile.passes.transforms.slices import Sliced
from memo_compile.planning.decide import Decided, carry_out
from memo_compile.planning.prepared import Prepared
from memo_compile.workspaces.annotate import Workspaces, workspaces_in

T = TypeVar("T")
FAR = 64  # times a size of which little memory depends: one range will do
LITTLE = 0.01  # of the bytes of all values
SHORTEST = 4  # the upper end over the lower end, where something is sliced
SLICES = 64
SAMPLES = 97  # lengths of a range at which an equality is looked at
LEAST_ROWS = 2 * SHORTEST  # of a slice at the upper end, so that it has two at the lower


@dataclass(frozen=True)
class Ends:
    """The values of all symbols at one upper end, and an input that is each symbol."""

    values: Mapping[Any, int]
    inputs: Mapping[Any, torch.SymInt]


def upper_ends(joint: fx.GraphModule, buckets: Sequence[int] = ()) -> Iterator[Ends]:
    """Upper ends worth a try, the farthest first, and at last the lengths at hand.

    Args:
        joint: a graph whose sizes are symbols.
        buckets: lengths that the user pads to: the next one is the end.

    Raises:
        NoRange: a size is no input, or does not grow with the length.
    """
    inputs = _inputs(joint)
    now = {s: seen(value) for s, value in inputs.items()}
    of_tensors = frozenset(s for size in _tensor_sizes(joint) for s in symbols_of(size))
    if not of_tensors <= inputs.keys():
        raise NoRange("a size that no input is")
    far = {s: _end(s, n, inputs[s], buckets) if s in of_tensors else n for s, n in now.items()}
    for symbol in of_tensors:
        if not bounded(symbol, inputs[symbol]) and not buckets:
            farther = {**far, symbol: FAR * far[symbol]}
            if _bytes(joint, farther) <= (1 + LITTLE) * _bytes(joint, far):
                far = farther
    _check_growing(joint, now, far)
    near = {s: n if s in of_tensors and bounded(s, inputs[s]) else min(far[s], -(-5 * n // 4)) for s, n in now.items()}
    tried = []
    for values in (far, near, now):
        if values not in tried:
            tried.append(values)
            yield Ends(values, inputs)


def _end(symbol: Any, length: int, value: torch.SymInt, buckets: Sequence[int]) -> int:
    if bounded(symbol, value):
        return largest(value)
    bucket = next((b for b in buckets if b >= length), None)
    return bucket if bucket is not None else 1 << (length - 1).bit_length()


def _inputs(joint: fx.GraphModule) -> dict[Any, torch.SymInt]:
    values = [n.meta.get("val") for n in joint.graph.find_nodes(op="placeholder")]
    return {v.node.expr: v for v in values if isinstance(v, torch.SymInt) and v.node.expr.is_Symbol}


def _tensors(joint: fx.GraphModule) -> list[torch.Tensor]:
    values = [n.meta.get("val") for n in joint.graph.nodes]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _tensor_sizes(joint: fx.GraphModule) -> list[Any]:
    return [s for s in sizes_of(_tensors(joint)) if is_symbolic(s)]


def _bytes_of(value: torch.Tensor, values: Mapping[Any, int]) -> int:
    count = value.element_size()
    for size in value.shape:
        count *= number_at(size, values)
    return int(count)


def _bytes(joint: fx.GraphModule, values: Mapping[Any, int]) -> int:
    return sum(_bytes_of(v, values) for v in _tensors(joint))


def _check_growing(joint: fx.GraphModule, now: Mapping[Any, int], end: Mapping[Any, int]) -> None:
    """Each value must be largest at the upper end: its size there is what is counted."""
    steps = (0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0)
    points = [{s: max(2, round(end[s] * share)) for s in now} for share in steps]
    for value in _tensors(joint):
        if any(is_symbolic(s) for s in value.shape):
            sizes = [_bytes_of(value, point) for point in points]
            if sizes != sorted(sizes):
                raise NoRange(f"a value of shape {tuple(value.shape)} does not grow with the length")


def slice_rows(tokens: int, least: int) -> int:
    """Rows of a slice where the user has not said."""
    return max(least, tokens // SLICES)


def over_range(
    joint: fx.GraphModule, lengths: str | tuple[int, ...], plan: Callable[[fx.GraphModule], T]
) -> tuple[T, Ends]:
    """What `plan` makes of the graph at the farthest upper end at which a budget can be kept.

    Raises:
        NoRange: the user wants each length for itself, or the graph cannot be planned for a range.
        BudgetTooSmall: not even the lengths at hand can be planned.
    """
    if lengths == "exact":
        raise NoRange("each length for itself")
    refused: BudgetTooSmall | None = None
    for ends in upper_ends(joint, lengths if isinstance(lengths, tuple) else ()):
        try:
            return plan(twin_at(joint, ends.values)), ends
        except BudgetTooSmall as error:
            refused = error
    assert refused is not None
    raise refused


def in_symbols(
    joint: fx.GraphModule, unplanned: Split, p: Prepared, decided: Decided, ends: Ends, host: int
) -> Decided:
    """The symbolic graphs of what was decided on the twin `p` at the upper ends, and a guard of the range.

    Args:
        unplanned: torch's split of the symbolic graph, which serves where nothing is to be done.

    Raises:
        NoRange: something cannot be said in symbols.
    """
    if not decided.homes:
        return _with_graphs(decided, _guarded(joint, ends, frozenset()), unplanned)
    lengths = _annotate(joint, p.joint)
    words = _guarded(joint, ends, frozenset(s for length in lengths.values() for s in symbols_of(length)))
    return _with_graphs(decided, words, _carried_out(joint, p, decided, ends, host))


def _with_graphs(decided: Decided, words: str, graphs: Split | Sliced) -> Decided:
    plan = replace(decided.plan, range=words)
    return replace(decided, plan=plan, forward=graphs.forward, backward=graphs.backward, saved=graphs.saved)


def _guarded(joint: fx.GraphModule, ends: Ends, sliced: frozenset[Any]) -> str:
    """Let Dynamo compile anew beyond the range; returns it in words. `sliced` are the symbols that rows are of."""
    words = []
    for symbol in sorted({s for size in _tensor_sizes(joint) for s in symbols_of(size)}, key=str):
        value, end = ends.inputs[symbol], ends.values[symbol]
        low = end // SHORTEST + 1 if symbol in sliced else 2
        if not bounded(symbol, value):
            assert bool(value <= end)
            assert bool(value >= low)
        if not is_symbolic(value) and low < end:
            raise NoRange(f"{symbol} has become a number")
        words.append(f"{_source(value, symbol)} in [{low}, {end}]")
    return "; ".join(words)


def _source(value: torch.SymInt, symbol: Any) -> str:
    """Where a symbol comes from, in Dynamo's words."""
    sources = value.node.shape_env.var_to_sources.get(symbol, ())
    name = getattr(sources[0], "name", None) if sources else None
    return str(name() if callable(name) else name or symbol)


def _carried_out(joint: fx.GraphModule, p: Prepared, decided: Decided, ends: Ends, host: int) -> Sliced:
    nodes = {n.name: n for n in joint.graph.nodes}
    if not {n.name for n in p.saved} <= nodes.keys():
        raise NoRange("a saved value that the symbolic graph has not")
    homes = {name: _symbolic(home, nodes[name]) for name, home in decided.homes.items()}
    # What kernels take was found out on the twin, in numbers.
    known = {w.node: w for g in (decided.forward, decided.backward) for w in workspaces_in(g)}
    numbers_known = Workspaces(p.fused, given=known)
    saved = tuple(nodes[n.name] for n in p.saved)
    symbolic = replace(p, joint=joint, saved=saved, workspaces=numbers_known)
    environment = _shape_env(joint)
    before = len(environment.guards)
    sliced = carry_out(symbolic, homes, ahead=decided.ahead, host_budget=host)
    for guard in environment.guards[before:]:
        if not _holds(guard.expr, ends):
            raise NoRange(f"slices are right only where {guard.expr}")
    return sliced


def _holds(condition: Any, ends: Ends) -> bool:
    """Whether an equality among sizes that torch could not prove holds all over the range; others only narrow it."""
    if type(condition).__name__ != "Equality":
        return True
    points = ({s: max(2, end - end * i // SAMPLES) for s, end in ends.values.items()} for i in range(SAMPLES))
    return all(bool(condition.xreplace({s: point[s] for s in condition.free_symbols})) for point in points)


def _shape_env(joint: fx.GraphModule) -> Any:
    return next(s.node.shape_env for s in _tensor_sizes(joint))


def _symbolic(home: Homes, node: fx.Node) -> Homes:
    return home if home.axis is None else replace(home, axis=node.meta[TOKENS].axis)


def _annotate(joint: fx.GraphModule, numbers: fx.GraphModule) -> dict[int, Any]:
    """Write the twin's token axes to the symbolic graph, with the lengths that they have there, which are returned."""
    infos: dict[str, tuple[fx.Node, TokenInfo]] = {
        n.name: (n, n.meta[TOKENS]) for n in numbers.graph.nodes if TOKENS in n.meta
    }
    lengths: dict[int, Any] = {}
    for node in joint.graph.nodes:
        value = node.meta.get("val")
        if node.name in infos and isinstance(value, torch.Tensor):
            axis = infos[node.name][1].axis
            if axis.outer == axis.inner == 1 and is_symbolic(value.shape[axis.dim]):
                lengths.setdefault(axis.tokens, value.shape[axis.dim])

    def of(axis: TokenAxis) -> TokenAxis:
        return replace(axis, length=lengths.get(axis.tokens))

    for node in joint.graph.nodes:
        node.meta.pop(TOKENS, None)
        if node.name in infos:
            other, info = infos[node.name]
            needs = dict(zip((a.name for a in other.all_input_nodes), info.operands, strict=True))
            wanted = (needs.get(a.name) for a in node.all_input_nodes)
            operands = tuple(None if need is None else of(need) for need in wanted)
            node.meta[TOKENS] = replace(info, axis=of(info.axis), operands=operands)
    return lengths
