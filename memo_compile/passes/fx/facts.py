"""Facts about one FX node: bytes, storage, kind of op, source line. Read only."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable

import torch
import torch.fx as fx

from memo_compile.errors import SizeUnknown
from memo_compile.passes.fx.sizes import elements, known, largest

_FILE_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)')

_PLUMBING = (
    "/torch/",
    "/memo_compile/models/parallel.py",
)  # frames that say nothing of where in a model a value is made

HOST_LEASE = "memo_host_lease"  # the placeholder through which a backward receives its forward's host lease

# Ops that make no new storage although their schema does not say so.
_VIEW_LIKE = frozenset({"aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::lift_fresh_copy"})

# Whose ops may run twice, as their schemas and tags tell. A collective has effects on other ranks, and an op of
# somebody else's may draw random numbers or count its calls.
_KNOWN_NAMESPACES = frozenset({"aten", "prims", "inductor", "memo", "memo_collectives"})


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors of a node's value, flattened; none for a scalar."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [v for v in value if isinstance(v, torch.Tensor)]
    return []


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's value as dense storage; 0 for scalars and for tuples (their items are counted).

    Where sizes are symbols, at the upper end of their ranges.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or is_on_host(node):
        return 0
    return elements(value.shape) * value.element_size()


def is_on_host(node: fx.Node) -> bool:
    """Whether the value is a lease on the host arena: its bytes are not the device's."""
    return node.name == HOST_LEASE or schema_name(node) == "memo::host_lease"


def is_dense(node: fx.Node) -> bool:
    """Whether the elements fill their storage without gaps or overlaps, in whatever order of dimensions."""
    value: torch.Tensor = node.meta["val"]
    expected = 1
    for stride, size in sorted((t, s) for s, t in dimensions(value) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dimensions(value: torch.Tensor) -> list[tuple[int, int]]:
    """Size and stride of each dimension, at the upper end of ranges."""
    return [(largest(s), largest(t)) for s, t in zip(value.shape, value.stride(), strict=True)]


def source_line(node: fx.Node) -> str:
    """`file:line: code` of the user's line that made this node, or "" where torch kept none.

    The innermost frame outside torch and memo is taken, since that is the line that a user can change.
    """
    trace = node.meta.get("stack_trace") or ""
    frames = list(_FILE_LINE.finditer(trace))
    for match in reversed(frames):
        if not any(part in match["file"] for part in _PLUMBING):
            return f"{match['file']}:{match['line']}: {match['code'].strip()}"
    return f"{frames[-1]['file']}:{frames[-1]['line']}: {frames[-1]['code'].strip()}" if frames else ""


def op_name(node: fx.Node) -> str:
    """`aten.mm.default` and the like; the node's op where it calls nothing."""
    return str(node.target) if node.op == "call_function" else node.op


def schema_of(target: object) -> torch.FunctionSchema | None:
    """The schema of an op; None for what is no op of torch."""
    found: torch.FunctionSchema | None = getattr(target, "_schema", None)
    return found


def schema_name_of(target: object) -> str:
    """The name of an op's schema, such as "aten::mm"; "" for what is no op of torch."""
    schema = schema_of(target)
    return schema.name if schema is not None else ""


def schema_name(node: fx.Node) -> str:
    """The name of the schema of what a node calls; "" for what is no op of torch."""
    return schema_name_of(node.target)


MATMULS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})  # by the names of their schemas

# (base, mask, indices, values): the gradient of a table that rows were looked up in, as Inductor has it.
PUT = torch.ops.aten._unsafe_masked_index_put_accumulate.default


def puts_into_zeros(node: fx.Node) -> bool:
    """Whether a node adds values to rows of zeros, which one tensor of indices names."""
    if node.target is not PUT:
        return False
    zeros, _, indices, _ = node.args
    alone = isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(indices[0], fx.Node)
    return alone and isinstance(zeros, fx.Node) and zeros.target is torch.ops.aten.full.default and not zeros.args[1]


def writes_in_place(node: fx.Node) -> bool:
    """Whether an op's schema says that it writes to an argument."""
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable)


def is_view(node: fx.Node) -> bool:
    """Whether the value shares the storage of its first tensor argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.name in _VIEW_LIKE:
        return True
    returns = target._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def is_write(node: fx.Node) -> bool:
    """Whether the node writes its second argument over its first, and makes no storage of its own."""
    return node.target is torch.ops.aten.copy_.default


def storage_of(node: fx.Node) -> fx.Node:
    """The node that made the storage in which this node's value lies: views, tuple items and writes are followed."""
    while True:
        if node.op == "call_function" and node.all_input_nodes:
            if is_view(node) or is_write(node) or _is_item_of_view(node):
                node = node.all_input_nodes[0]
                continue
            overwritten = _overwritten_by(node)
            if overwritten is not None:
                node = overwritten
                continue
        return node


def is_view_of(node: fx.Node) -> bool:
    """Whether the value is a view, or an item of several views of one value."""
    return is_view(node) or _is_item_of_view(node)


def _is_item_of_view(node: fx.Node) -> bool:
    return node.target is operator.getitem and is_view(node.all_input_nodes[0])


def _overwritten_by(node: fx.Node) -> fx.Node | None:
    """The argument over which the op writes the result that `node` takes from it."""
    if node.target is not operator.getitem:
        return None
    made, index = node.args
    assert isinstance(made, fx.Node)
    assert isinstance(index, int)
    overwritten = made.args[index] if returns_operands(made) else None
    return overwritten if isinstance(overwritten, fx.Node) else None


def returns_operands(node: fx.Node) -> bool:
    """Whether an op writes all its results over its first arguments."""
    return op_name(node) in ("memo.attention_onto.default", "memo.attention_backward_onto.default")


def readers_of(value: fx.Node, beside: Collection[fx.Node] = ()) -> set[fx.Node]:
    """All that reads what lies in the storage of `value`: views and items of it are followed, but not `beside`."""
    root = storage_of(value)
    found, stack = set[fx.Node](), [root]
    while stack:
        for user in stack.pop().users:
            if user in found or user in beside:
                continue
            found.add(user)
            lying_there = user.users if returns_operands(user) else [user]
            stack += [n for n in lying_there if storage_of(n) is root]
    return found


def is_read_from(node: fx.Node, value: fx.Node, beside: Collection[fx.Node]) -> bool:
    """Whether `node`, or one that stands after it, reads what lies in the storage of `value`; `beside` do not count."""
    return any(reader >= node for reader in readers_of(value, beside))


def has_tag(node: fx.Node, tag: torch.Tag) -> bool:
    """Whether the op carries a torch tag."""
    return isinstance(node.target, torch._ops.OpOverload) and tag in node.target.tags


def is_random(node: fx.Node) -> bool:
    """Whether running the op twice may give two values. Attention with `dropout_p=0` draws nothing."""
    return has_tag(node, torch.Tag.nondeterministic_seeded) and argument(node, "dropout_p") != 0.0


def argument(node: fx.Node, name: str) -> object:
    """The value of an op's argument, wherever it stands; None where the op has none of that name."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    for i, declared in enumerate(target._schema.arguments):
        if declared.name == name:
            given = node.args[i] if i < len(node.args) else declared.default_value
            return node.kwargs.get(name, given)
    return None


def is_seed(node: fx.Node) -> bool:
    """Whether the value is what Inductor's random numbers are a function of: few bytes, drawn afresh at each run."""
    return schema_name(node) in _SEEDS


def draws_from_seed(node: fx.Node) -> bool:
    """Whether the op gives random numbers that are a function of a seed and of their place in the whole draw."""
    return schema_name(node) in _DRAWS


def is_pointwise(node: fx.Node) -> bool:
    """Elementwise ops, casts among them: a compiler fuses them into what reads them."""
    if has_tag(node, torch.Tag.pointwise):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.name in _POINTWISE or _is_one_hot(node)


def _is_one_hot(node: fx.Node) -> bool:
    """A number written into one place of each row of a constant, as the gradient of a cross entropy begins: Inductor
    makes a comparison of it (`scatter_upon_const_tensor`), so that classes times tokens are never stored for it.
    """
    if node.target is not torch.ops.aten.scatter.value:
        return False
    constant, dim, index = node.args[0], node.args[1], node.args[2]
    return (
        isinstance(constant, fx.Node)
        and constant.target is torch.ops.aten.full.default
        and isinstance(dim, int)
        and isinstance(index, fx.Node)
        and int(index.meta["val"].shape[dim]) == 1
    )


_SEEDS = frozenset({"prims::inductor_seed", "prims::inductor_seeds"})
_DRAWS = frozenset({"prims::inductor_random", "prims::inductor_randint"})

_POINTWISE = frozenset(
    {
        *_DRAWS,
        "prims::convert_element_type",
        "aten::_to_copy",
        "aten::clone",
        "aten::expand",
        "aten::where",
        "aten::full",
        "aten::full_like",
        "aten::scalar_tensor",
        "aten::arange",
        "prims::iota",
        "prims::fma",
        "aten::slice_backward",
        "aten::select_backward",
        "aten::constant_pad_nd",
        "aten::cat",
        "aten::embedding",
        "aten::index",
        "aten::gather",
    }
)

_REDUCTIONS = frozenset(
    {
        "aten::sum",
        "aten::mean",
        "aten::amax",
        "aten::amin",
        "aten::var_mean",
        "aten::var",
        "aten::max",
        "aten::min",
        "aten::any",
        "aten::all",
        "aten::argmax",
        "aten::argmin",
        "aten::prod",
        "aten::_softmax",
        "aten::_log_softmax",
        "aten::_softmax_backward_data",
        "aten::_log_softmax_backward_data",
        "aten::native_layer_norm",
    }
)


def is_reduction(node: fx.Node) -> bool:
    """Reductions that a compiler emits as loops, into which pointwise producers are fused."""
    return schema_name(node) in _REDUCTIONS


LITTLE = 32  # by this factor a table is smaller than what is looked up in it
_COSTLY = frozenset({"aten::cat", "aten::embedding", "aten::index", *_DRAWS})


def is_cheap(node: fx.Node) -> bool:
    """Ops so cheap that computing them again beats holding their result: views, casts, arithmetic on elements."""
    if node.op != "call_function" or is_random(node) or not is_pure(node):
        return False
    if node.target is operator.getitem:
        return _is_item_of_view(node)
    name = schema_name(node)
    return is_view(node) or (is_pointwise(node) and name not in _COSTLY) or _looks_up_little(node)


def _looks_up_little(node: fx.Node) -> bool:
    """Whether rows are looked up in a table much smaller than what is read of it, such as T5's position bias."""
    table = node.args[0] if schema_name(node) == "aten::embedding" else None
    return isinstance(table, fx.Node) and LITTLE * nbytes(table) <= nbytes(node)


def is_pure(node: fx.Node) -> bool:
    """Whether the node may be run a second time, in the backward, and give the same value with no other effect."""
    if node.op != "call_function":
        return node.op == "get_attr"
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True  # arithmetic on sizes
    if node.target is operator.getitem:
        return is_pure(node.all_input_nodes[0])
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False  # higher-order ops and Python functions: nothing says that they are pure
    if target.namespace not in _KNOWN_NAMESPACES or target._schema.is_mutable:
        return False
    return not is_random(node)


def ordered(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Nodes in graph order, each once."""
    unique = set(nodes)
    if not unique:
        return []
    graph = next(iter(unique)).graph
    return [n for n in graph.nodes if n in unique]


def check_sizes(joint: fx.GraphModule) -> None:
    """Every size of every value must be known before the step: a number, or made of the inputs' sizes.

    Raises:
        SizeUnknown: with the op and the user's line.
    """
    for node in joint.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        if not all(known(s) for s in sizes):
            raise SizeUnknown(f"{op_name(node)} ({source_line(node)})")
