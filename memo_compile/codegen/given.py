"""What Inductor is given, in text: a graph, values, its settings. Two that read alike are compiled alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

from memo_compile.passes.fx.meta import LAYER, TOKENS

LEFT_OUT = ("fx_graph_cache", "compile_threads")  # the first is memo's own, the second changes no plan
SIMPLE = (str, int, float, bool, type(None))


def settings_of_inductor() -> dict[str, str]:
    """Inductor's settings that can be told, by name; what a setting calls is memo's own, or the options have it."""
    from torch._inductor import config  # loads Inductor

    found: Any = config
    settings = found.get_config_copy()
    return {k: repr(v) for k, v in sorted(settings.items()) if k not in LEFT_OUT and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return _is_plain([*value.keys(), *value.values()])
    return isinstance(value, SIMPLE)


def lines_of(gm: fx.GraphModule) -> Iterator[str]:
    """A graph in text: names, calls, values, layers, token axes; then the graphs within it."""
    for node in gm.graph.nodes:
        values = [value_text(v) for v in _flat(node.meta.get("val"))]
        notes = (node.meta.get(LAYER), node.meta.get(TOKENS))
        yield f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {values} {notes}"
    for name, inner in gm.named_children():
        if isinstance(inner, fx.GraphModule):
            yield name
            yield from lines_of(inner)


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def value_text(value: Any) -> str:
    """A tensor's type and layout; anything else as it prints."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    strides = value.stride() if value.layout == torch.strided else value.layout
    return f"{value.dtype} {tuple(value.shape)} {strides} {value.storage_offset()} {value.device}"
