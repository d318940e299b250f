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
from memo_compile.passes.fx.growth import is_largest_at_the_end
from memo_compile.passes.fx.meta import TOKENS
from memo_compile.passes.fx.ranges import NoRange, twin_at
from memo_compile.passes.fx.sizes import bounded, is_symbolic, largest, seen, sizes_of, symbols_of
from memo_compile.passes.transforms.partition import Split
from memo_compile.passes.transforms.residency import Residency
from memo_compile.passes.transforms.slices import Sliced
from memo_compile.planning.decide import Decided, carry_out
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import Limits
from memo_compile.workspaces.annotate import Workspaces, workspaces_in

T = TypeVar("T")
FAR = 64  # times a size of which little memory depends: one range will do
LITTLE = 0.01  # of the bytes of all values
SHORTEST = 4  # the upper end over the lower end, where something is sliced
SLICES = 64
SAMPLES = 97  # lengths of a range at which an equality is looked at


@dataclass(frozen=True)
class Ends:
    """The values of all symbols at one upper end, and an input that is each symbol.

    `lows` are the least values where rows are of the symbol. Values are not `sliced` where the user has said which
    lengths there are: what torch cannot prove of borders of slices it takes for a narrower range, which is an error.
    """

    values: Mapping[Any, int]
    inputs: Mapping[Any, torch.SymInt]
    lows: Mapping[Any, int]
    sliced: bool = True

    @property
    def least_rows(self) -> int:
        """Rows of a slice at the upper end, so that it has two at the lower; all of them where nothing is sliced."""
        return 2 * SHORTEST if self.sliced else max(self.values.values())


def upper_ends(joint: fx.GraphModule, buckets: Sequence[int] = ()) -> Iterator[Ends]:
    """Upper ends worth a try, the farthest first, and at last the lengths at hand.

    Args:
        joint: a graph whose sizes are symbols.
        buckets: lengths that the user pads to: the next one is the end.

    Raises:
        NoRange: a size is no input, or may be larger than where the length is largest.
    """
    inputs = _inputs(joint)
    now = {s: seen(value) for s, value in inputs.items()}
    of_tensors = frozenset(s for size in _tensor_sizes(joint) for s in symbols_of(size))
    if not of_tensors <= inputs.keys():
        raise NoRange("a size that no input is")
    far = {s: _end(s, n, inputs[s], buckets) if s in of_tensors else n for s, n in now.items()}
    for symbol in sorted(of_tensors, key=str) if not buckets else ():
        farther = {**far, symbol: _within(FAR * far[symbol], symbol, inputs[symbol])}
        if _bytes(joint, farther) <= (1 + LITTLE) * _bytes(joint, far):
            far = farther
    _check_growing(joint, {s: (min(2, far[s]), far[s]) for s in of_tensors})
    given = {s for s in of_tensors if _is_given(s, inputs[s])}
    near = {s: far[s] if s in given else min(far[s], -(-5 * n // 4)) for s, n in now.items()}
    last = {s: far[s] if s in given else n for s, n in now.items()}
    tried = []
    for values in (far, near, last):
        if values not in tried:
            tried.append(values)
            yield Ends(values, inputs, {s: _low(s, values[s], inputs[s]) for s in of_tensors}, sliced=not given)


def _low(symbol: Any, end: int, value: torch.SymInt) -> int:
    if _is_given(symbol, value):
        return int(value.node.shape_env.var_to_range[symbol].lower)
    return end // SHORTEST + 1


def _is_given(symbol: Any, value: torch.SymInt) -> bool:
    """Whether the user has said which lengths there are, `mark_dynamic(x, dim, min=…, max=…)`: all are to be served."""
    checks = [g.expr for g in value.node.shape_env.guards if g.expr.free_symbols == {symbol}]
    return bounded(symbol, value) and not any(type(c).__name__ in _COMPARISONS for c in checks)


_COMPARISONS = ("LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan")


def _end(symbol: Any, length: int, value: torch.SymInt, buckets: Sequence[int]) -> int:
    if _is_given(symbol, value):
        return largest(value)
    bucket = next((b for b in sorted(buckets) if length <= b < SHORTEST * length), None)
    return _within(bucket if bucket is not None else 1 << (length - 1).bit_length(), symbol, value)


def _within(end: int, symbol: Any, value: torch.SymInt) -> int:
    """An end that is not beyond what the symbol's range allows: that of the user's `mark_dynamic`, or of a check."""
    return min(end, largest(value)) if bounded(symbol, value) else end


def _inputs(joint: fx.GraphModule) -> dict[Any, torch.SymInt]:
    values = [n.meta.get("val") for n in joint.graph.find_nodes(op="placeholder")]
    return {v.node.expr: v for v in values if isinstance(v, torch.SymInt) and v.node.expr.is_Symbol}


def _tensors(joint: fx.GraphModule) -> list[torch.Tensor]:
    values = [n.meta.get("val") for n in joint.graph.nodes]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _tensor_sizes(joint: fx.GraphModule) -> list[Any]:
    return [s for s in sizes_of(_tensors(joint)) if is_symbolic(s)]


def _bytes(joint: fx.GraphModule, values: Mapping[Any, int]) -> int:
    """Bytes of all that a step makes, but for what is as large as an input, as gradients of parameters are."""
    placeholders = [n.meta.get("val") for n in joint.graph.find_nodes(op="placeholder")]
    inputs = {size for v in placeholders if isinstance(v, torch.Tensor) and isinstance(size := _size(v), int)}
    total = 0
    for value in _tensors(joint):
        size = _size(value)
        if size not in inputs:
            total += int(size if isinstance(size, int) else size.xreplace(dict(values))) * value.element_size()
    return total


def _size(value: torch.Tensor) -> Any:
    """Elements, as a sympy expression where that is none but a number."""
    count: Any = 1
    for size in value.shape:
        count *= size.node.expr if isinstance(size, torch.SymInt) and is_symbolic(size) else int(size)
    return count


def _check_growing(joint: fx.GraphModule, box: Mapping[Any, tuple[int, int]]) -> None:
    """Each value must be largest at the upper end: its size there is what is counted."""
    checked: set[Any] = set()
    for value in _tensors(joint):
        size = _size(value)
        if isinstance(size, int) or size in checked:
            continue
        checked.add(size)
        if not is_largest_at_the_end(size, box):
            raise NoRange(f"a value of shape {tuple(value.shape)} may be larger where a length is smaller")


def for_a_range(p: Prepared, limits: Limits, *, least: int) -> Limits:
    """Limits of a plan for a range: slices have at least `least` rows, and tiles are of one; 0 for one length alone."""
    if not least:
        return limits
    if limits.tiles not in (1, "auto"):
        raise NoRange("tiles are of one length")
    return replace(limits, tiles=1, slice_tokens=slice_rows(p.tokens.tokens, least, limits.slice_tokens))


def slice_rows(tokens: int, least: int, asked: int) -> int:
    """Rows of a slice at the upper end: what the user asks for, or a share of all, and at least so many."""
    return max(1, min(tokens, max(least, asked or tokens // SLICES)))


def over_range(
    joint: fx.GraphModule, lengths: str | tuple[int, ...], plan: Callable[[fx.GraphModule, int], T]
) -> tuple[T, Ends]:
    """What `plan` makes of the graph at the farthest upper end at which a budget can be kept.

    It is given the graph in numbers, and the rows that a slice must have.

    Raises:
        NoRange: the user wants each length for itself, or the graph cannot be planned for a range.
        BudgetTooSmall: not even the lengths at hand can be planned.
    """
    if lengths == "exact":
        raise NoRange("each length for itself")
    refused: BudgetTooSmall | None = None
    for ends in upper_ends(joint, lengths if isinstance(lengths, tuple) else ()):
        try:
            return plan(twin_at(joint, ends.values), ends.least_rows), ends
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
    if not decided.residency:
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
        low = ends.lows[symbol] if symbol in sliced else 2
        if seen(value) < low and symbol in sliced:
            raise NoRange(f"{symbol} would have slices without rows")
        _guard(value <= end)
        _guard(value >= low)
        if not is_symbolic(value) and low < end:
            raise NoRange(f"{symbol} has become a number")
        words.append(f"{_source(value, symbol)} in [{low}, {end}]")
    return "; ".join(words)


def _guard(condition: Any) -> None:
    """Let Dynamo compile anew where a condition, which holds now, does not hold."""
    if not bool(condition):
        raise NoRange(f"{condition} does not hold")


def _source(value: torch.SymInt, symbol: Any) -> str:
    """Where a symbol comes from, in Dynamo's words."""
    sources = value.node.shape_env.var_to_sources.get(symbol, ())
    name = getattr(sources[0], "name", None) if sources else None
    return str(name() if callable(name) else name or symbol)


def _carried_out(joint: fx.GraphModule, p: Prepared, decided: Decided, ends: Ends, host: int) -> Sliced:
    nodes = {n.name: n for n in joint.graph.nodes}
    if not {n.name for n in p.saved} <= nodes.keys():
        raise NoRange("a saved value that the symbolic graph has not")
    residency = {name: _symbolic(home, nodes[name]) for name, home in decided.residency.items()}
    # What kernels take was found out on the twin, in numbers.
    known = {w.node: w for g in (decided.forward, decided.backward) for w in workspaces_in(g)}
    numbers_known = Workspaces(p.fused, given=known)
    saved = tuple(nodes[n.name] for n in p.saved)
    symbolic = replace(p, joint=joint, saved=saved, workspaces=numbers_known)
    environment = next(iter(ends.inputs.values())).node.shape_env
    before = len(environment.guards)
    sliced = carry_out(symbolic, residency, overlap=decided.overlap, host_budget=host)
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


def _symbolic(home: Residency, node: fx.Node) -> Residency:
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
