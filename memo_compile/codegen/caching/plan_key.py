"""What a plan is kept under by itself: all that decides it, of the graph and beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import torch
import torch.fx as fx

from memo_compile.codegen.caching.key import digest_of, torch_keeps
from memo_compile.passes.fx.meta import LAYER, TOKENS
from memo_compile.planning.prepared import Prepared
from memo_compile.trace.setting import Setting

LEFT_OUT = ("fx_graph_cache", "compile_threads")  # the first is memo's own, the second changes no plan
SIMPLE = (str, int, float, bool, type(None))


def keeps_plans(setting: Setting) -> bool:
    """Whether plans are read and kept; asked before Inductor is given settings for a compilation.

    Not where the user has turned a cache off; not with a dump, which is of a compilation; not with poison, which marks
    what is planned.
    """
    options = setting.options
    return options.cache and options.dump is None and options.verify != "poison" and torch_keeps()


def plan_key(setting: Setting, p: Prepared, *numbers: Any) -> str:
    """The key of a prepared graph's plan. `numbers` are those that Inductor hands over with the graph."""
    options = setting.options
    facts = (
        digest_of(setting),
        torch.__version__,
        settings_of_inductor(),
        [str(option) for option in (options.mode, sorted(options.inductor.items()))],
        p.num_forward_outputs,
        [node.name for node in p.saved],
        sorted(p.seconds.items()),
        repr(p.policies),
        list(lines_of(p.joint)),
        list(lines_of(p.unplanned.forward)),
        list(lines_of(p.unplanned.backward)),
        repr(numbers),
    )
    return sha256(json.dumps(facts, default=str).encode()).hexdigest()


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
        values = [_value(v) for v in _flat(node.meta.get("val"))]
        notes = (node.meta.get(LAYER), node.meta.get(TOKENS))
        yield f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {values} {notes}"
    for name, inner in gm.named_children():
        if isinstance(inner, fx.GraphModule):
            yield name
            yield from lines_of(inner)


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _value(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    strides = value.stride() if value.layout == torch.strided else value.layout
    return f"{value.dtype} {tuple(value.shape)} {strides} {value.storage_offset()} {value.device}"
