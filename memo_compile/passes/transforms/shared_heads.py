"""Lets query heads share keys and values in a fused attention on the CPU, where a model has repeated these for it.

A model with grouped queries repeats each key and value for the query heads of its group, and sums their gradients over
the group. The kernel does both by itself: what was repeated is neither made nor saved.

Private torch APIs, tried with torch 2.13: `_fused_sdp_choice`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.analysis.token_axis import shape_of
from memo_compile.passes.fx.build import call, fake_mode, told
from memo_compile.passes.fx.facts import schema_name

aten = torch.ops.aten
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SAME = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::clone"})
_SHAPED = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape"})


def share_heads(gm: fx.GraphModule) -> fx.GraphModule:
    """Give attentions the keys and values that their repeated ones were made from.

    Keys and values that nothing reads any more stay in the graph: they may be what torch would save.
    """
    if not _kernel_shares_heads():
        return gm
    for node in gm.graph.find_nodes(op="call_function", target=_FORWARD):
        small = [_repeated(value) for value in node.args[1:3]]
        if _are_alike(small):
            _give(node, 1, small)
    for node in gm.graph.find_nodes(op="call_function", target=_BACKWARD):
        small = [_repeated(value) for value in node.args[2:4]]
        sums = [_sum_over_groups(node, item, value) for item, value in enumerate(small, 1)]
        if _are_alike(small) and all(sums):
            _give(node, 2, small)
            for item, found in enumerate(sums, 1):
                assert found is not None
                _take(node, item, found)
    gm.recompile()
    return gm


@cache
def _kernel_shares_heads() -> bool:
    """Whether torch gives its kernel fewer heads of keys than of queries: one that does not know them reads beyond."""
    with ThreadPoolExecutor(1) as thread:  # in which no mode of this one is on
        return thread.submit(_is_chosen).result()


def _is_chosen() -> bool:
    query, key = (torch.ones(1, heads, 8, 8, requires_grad=True) for heads in (2, 1))
    choice = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True)
    return choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def _are_alike(small: Sequence[fx.Node | None]) -> bool:
    """Whether keys and values are both repeated, for groups of one size."""
    return len({value and shape_of(value)[1] for value in small} | {None}) == 2 and None not in small


def _give(node: fx.Node, at: int, small: Sequence[fx.Node | None]) -> None:
    """Put `small` in the place of the keys and values, which stand at `at` and after it."""
    node.args = (*node.args[:at], *small, *node.args[at + 2 :])
    values: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    target: Any = node.target
    with fake_mode(node.graph), torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])


def _repeated(value: Any) -> fx.Node | None:
    """What (batch, heads, rows, size) repeats for each of a group's heads, which stand beside each other."""
    if not isinstance(value, fx.Node) or len(shape_of(value)) != 4:
        return None
    batch, heads, rows, size = shape_of(value)
    shapes = []
    while schema_name(value) in _SAME:
        shapes.append(shape_of(value))
        (value,) = value.all_input_nodes
    if schema_name(value) != "aten::expand" or schema_name(value.args[0]) != "aten::unsqueeze":
        return None
    unsqueezed: Any = value.args[0]
    small, dim = unsqueezed.args
    wide = shape_of(value)
    if dim != 2 or len(shape_of(small)) != 4 or len(wide) != 5:
        return None
    alike = shape_of(small) == (batch, wide[1], rows, size) and wide == (batch, wide[1], wide[2], rows, size)
    grouped = alike and wide[1] * wide[2] == heads
    return small if grouped and all(shape in (wide, (batch, heads, rows, size)) for shape in shapes) else None


def _sum_over_groups(node: fx.Node, item: int, small: fx.Node | None) -> fx.Node | None:
    """The sum over each group's heads of an item of an attention's gradients, where nothing else reads the item."""
    taken = [user for user in node.users if user.target is operator.getitem and user.args[1] == item]
    if len(taken) != 1 or small is None:
        return None
    batch, heads, rows, size = shape_of(small)
    value = taken[0]
    while len(value.users) == 1 and schema_name(value) != "aten::sum":
        source, (value,) = value, value.users
        if schema_name(value) not in _SHAPED and schema_name(value) != "aten::sum":
            return None
    summed = schema_name(value) == "aten::sum" and value.args[1] in ([2], [-3]) and not value.kwargs
    if not summed or len(shape_of(source)) != 5 or not value.meta["val"].is_contiguous():
        return None
    wide = shape_of(source)
    return value if wide[:2] == (batch, heads) and wide[3:] == (rows, size) else None


def _take(node: fx.Node, item: int, found: fx.Node) -> None:
    """Read the kernel's own sum in the place of `found`, laid out alike."""
    with node.graph.inserting_before(found):
        made = told(call(node.graph, operator.getitem, (node, item)), found)
        made = told(call(node.graph, aten.clone.default, (made,), {"memory_format": torch.contiguous_format}), found)
        if len(shape_of(found)) == 5:
            made = told(call(node.graph, aten.unsqueeze.default, (made, 2)), found)
    found.replace_all_uses_with(made)
    while found is not node:  # what it was summed from has another shape now
        (source,) = found.all_input_nodes
        node.graph.erase_node(found)
        found = source
