"""Tells of a mask that is computed from constants alone whether it is causal: no query sees a later key.

A mask has as many numbers as tokens squared, and is not computed for this. What is made of one vector by rows and of
one by columns is told by the vectors: `keys[j] <= queries[i]` holds for j ≤ i and for no other, or it does not. What is
made of such a value and of constants has one value below the diagonal and on it, and one above.

Hugging Face's models make such masks whenever they are compiled, from positions and from segments of packed sequences,
of which there is one.

Private torch APIs, tried with torch 2.11 and 2.13: `unset_fake_temporarily` and `_disable_current_modes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from memo_compile.passes.analysis.token_rules import is_elementwise
from memo_compile.passes.fx.facts import is_pure, schema_name
from memo_compile.passes.fx.sizes import is_symbolic

SMALL = 16  # numbers a token, at most, in what is computed
LARGEST = 2**40  # of positions


@dataclass(frozen=True)
class Sides:
    """A value of (…, queries, keys): one number where the key is no later than the query, and one where it is.

    Each is a tensor of one number, with dimensions if the value has them: types are promoted alike.
    """

    seen: torch.Tensor
    later: torch.Tensor


@dataclass(frozen=True)
class Difference:
    """A value of (…, queries, keys) that is `keys[j] - queries[i]`; int64, as `_exact` gives them."""

    keys: torch.Tensor
    queries: torch.Tensor


Known = torch.Tensor | Sides | Difference


class Mask(Enum):
    """What a mask hides from each query."""

    CAUSAL = "later keys"
    NONE = "nothing"


def known_mask(mask: fx.Node) -> Mask | None:
    """What a mask that is added to scores hides, as many keys as queries, whatever the inputs are; None if unknown."""
    shape = _shape(mask)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        return None
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
        found = _evaluated(mask, shape[-1])
        sides = _sides_of_few(found) if isinstance(found, torch.Tensor) else found
        if not isinstance(sides, Sides) or float(sides.seen) != 0:
            return None
        return {-torch.inf: Mask.CAUSAL, 0.0: Mask.NONE}.get(float(sides.later))


def _sides_of_few(value: torch.Tensor) -> Sides | None:
    """Of what was computed at its size, as masks of few tokens are, or has but one number."""
    count = value.shape[-1] if value.dim() > 1 else 1
    if not value.numel():
        return None
    seen, later = value.flatten()[:1], value.flatten()[min(1, value.numel() - 1)]
    expected = torch.where(torch.ones(count, count, dtype=torch.bool).tril(), seen, later)
    told = value.shape[-2:] == expected.shape and bool((value == expected).all())
    return Sides(seen, later) if told else _sides(value)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor whose sizes are numbers; that of a scalar for anything else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or any(map(is_symbolic, value.shape)):
        return ()
    return tuple(map(int, value.shape))


# What torch raises for a type without such an op, or for a number that has too few dimensions for it.
_CANNOT_TELL = (RuntimeError, IndexError, TypeError, ValueError)


def _evaluated(mask: fx.Node, count: int) -> Known | None:
    """What is known of a mask of `count` keys; None where an input, or an op without a rule, is among what makes it."""
    found: dict[fx.Node, Known] = {}
    for node in _made_from(mask):
        try:
            value = _value(node, found, count) if _is_of_constants(node) else None
        except _CANNOT_TELL:
            value = None
        if value is None:
            return None
        found[node] = value
    return found[mask]


def _is_of_constants(node: fx.Node) -> bool:
    """Whether an op gives the same numbers for the same operands, and is of numbers whose sizes are known."""
    value = node.meta.get("val")
    of_numbers = isinstance(value, torch.Tensor) and not any(map(is_symbolic, value.shape))
    return of_numbers and node.op == "call_function" and is_pure(node) and "empty" not in schema_name(node)


def _made_from(mask: fx.Node) -> list[fx.Node]:
    found, stack = {mask}, [mask]
    while stack:
        new = set(stack.pop().all_input_nodes) - found
        found |= new
        stack += new
    return sorted(found)


def _value(node: fx.Node, found: Mapping[fx.Node, Known], count: int) -> Known | None:
    if all(_is_small(n, count) for n in (node, *node.all_input_nodes)):
        return _of_its_type(node, _run(node, found))
    return _of_its_type(node, _wide(node, found)) if _shape(node)[-2:] == (count, count) else None


def _of_its_type(node: fx.Node, value: Known | None) -> Known | None:
    """A value, unless it is of another type than the node's, as where bits are viewed as another type's."""
    numbers = (value.seen, value.later) if isinstance(value, Sides) else (value,)
    alike = all(not isinstance(n, torch.Tensor) or n.dtype == node.meta["val"].dtype for n in numbers)
    return value if alike else None


def _is_small(node: fx.Node, count: int) -> bool:
    return math.prod(_shape(node)) <= SMALL * count


def _wide(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A value of (…, queries, keys) of which nothing is computed at its size. Vectors are not repeated for it."""
    if node.target is torch.ops.aten.full.default:
        number = torch.full((1, 1), node.args[1], dtype=node.meta["val"].dtype)  # type: ignore[arg-type]
        return Sides(number, number)
    operands = node.all_input_nodes
    if schema_name(node) in _SAME_PLACES or (
        schema_name(node) == "aten::slice" and _shape(node) == _shape(operands[0])
    ):
        return found[operands[0]]
    if not is_elementwise(node):
        return None
    sides = {a: _sides(found[a]) for a in operands}
    if None in sides.values():
        return _of_vectors(node, found)
    seen, later = (_run(node, {a: getattr(s, side) for a, s in sides.items()}) for side in ("seen", "later"))
    return None if seen is None or later is None else Sides(seen, later)


# Whose results have the last two dimensions of what they read, in the same places, where they are as many.
_SAME_PLACES = frozenset({"aten::expand", "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::unsqueeze"})


def _sides(value: Known) -> Sides | None:
    if isinstance(value, Sides):
        return value
    if not isinstance(value, torch.Tensor) or not value.numel() or value.is_complex():
        return None
    number = value.flatten()[:1].reshape((1,) * value.dim())
    same = bool((value == number).all()) and bool((value.signbit() == number.signbit()).all())
    return Sides(number, number) if same else None


def _of_vectors(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A difference of a vector of keys and one of queries, or such a comparison."""
    name = schema_name(node)
    args: Any = node.args
    if len(args) != 2 or node.kwargs:
        return None
    left, right = (found[a] if isinstance(a, fx.Node) else torch.tensor(a) for a in args)
    if name == "aten::sub":
        return _difference(left, right, node.meta["val"].dtype)
    return _comparison(left, right, *_COMPARISONS[name]) if name in _COMPARISONS else None


_COMPARISONS = {
    "aten::le": (False, False),
    "aten::lt": (True, False),
    "aten::ge": (False, True),
    "aten::gt": (True, True),
}
"""Of each whether it is strict, and whether its operands are the other way about."""


def _difference(left: Known, right: Known, dtype: torch.dtype) -> Difference | None:
    """`left - right`, where no number of it is too large for its type."""
    keys, queries = _by_keys(left), _by_queries(right)
    if keys is None or queries is None:
        keys, queries = _by_keys(right), _by_queries(left)
        if keys is None or queries is None:
            return None
        keys, queries = -keys, -queries
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return None
    least, most = int(keys.min()) - int(queries.max()), int(keys.max()) - int(queries.min())
    fits = torch.iinfo(dtype).min <= least and most <= torch.iinfo(dtype).max
    return Difference(keys, queries) if fits else None


def _comparison(left: Known, right: Known, strict: bool, turned: bool) -> Sides | None:
    """`left <= right`, or `left < right`; `turned`: `right` and `left` so."""
    if turned:
        left, right = right, left
    for first, second, negated in ((left, right, False), (right, left, True)):  # a > b where not a <= b
        keys, queries = _sides_of(first, second)
        if keys is None or queries is None:
            continue
        strictly, yes, no = strict is not negated, torch.full((1, 1), not negated), torch.full((1, 1), negated)
        if _holds_up_to_the_diagonal(keys, queries, strict=strictly):
            return Sides(yes, no)
        if _holds_up_to_the_diagonal(-keys, -queries, strict=not strictly):  # behind it, the other way about
            return Sides(no, yes)
    return None


def _sides_of(left: Known, right: Known) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Vectors of keys and of queries with `left <= right` where `keys[j] <= queries[i]`."""
    if isinstance(left, Difference) and isinstance(right, torch.Tensor) and right.numel() == 1:
        bound = _exact(right)
        return left.keys, None if bound is None else left.queries + bound
    return _by_keys(left), _by_queries(right)


def _by_keys(value: Known) -> torch.Tensor | None:
    """A vector along the last dimension."""
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == value.numel() > 1:
        return _exact(value)
    return None


def _by_queries(value: Known) -> torch.Tensor | None:
    """A vector along the last dimension but one."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-2] == value.numel() > 1:
        return _exact(value)
    return None


def _exact(value: torch.Tensor) -> torch.Tensor | None:
    """The numbers in int64, where they are whole and so small that sums and differences of some are exact.

    Of what devices round, each in its way, nothing is said.
    """
    if value.is_floating_point() or value.is_complex():
        return None
    numbers = value.flatten().to(torch.int64)
    return numbers if bool(((numbers < LARGEST) & (numbers > -LARGEST)).all()) else None


def _holds_up_to_the_diagonal(keys: torch.Tensor, queries: torch.Tensor, *, strict: bool) -> bool:
    """Whether `keys[j] <= queries[i]`, or `<`, where j ≤ i, and nowhere else."""
    if keys.numel() != queries.numel():
        return False
    holds: Callable[..., torch.Tensor] = torch.lt if strict else torch.le
    largest = keys.cummax(0).values  # of those up to each
    smallest = keys.flip(0).cummin(0).values.flip(0)  # of those from each on
    return bool(holds(largest, queries).all()) and not bool(holds(smallest[1:], queries[:-1]).any())


def _run(node: fx.Node, found: Mapping[fx.Node, Any]) -> torch.Tensor | None:
    """The op on the CPU, on what is known of its operands."""
    target: Any = node.target
    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda a: _given(a, found))
    result = target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


def _given(argument: Any, found: Mapping[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return found[argument]
    return torch.device("cpu") if isinstance(argument, torch.device) else argument
