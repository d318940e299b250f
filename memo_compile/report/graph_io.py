"""A joint graph as JSON, and back: ops, arguments, shapes, strides, dtypes and what the passes read of `meta`.

No tensor data is written. What comes back is a graph over fake tensors, on which the passes run as they did on the
original, on a machine without its devices. Reading resolves names inside torch's own modules only, so that a dump from
a stranger runs none of their code.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: AOTAutograd's descriptors of inputs and outputs, a
frozen dataclass each.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from memo_compile.errors import NotReplayable

_DESCRIPTORS = "torch._functorch._aot_autograd.descriptors"

# Large, or computed from the rest, and read by no pass.
_LEFT_OUT = frozenset(
    {"tensor_meta", "from_node", "source_fn_stack", "fwd_source_fn_stack", "eager_input_vals", "example_value"}
)
_SHARED = frozenset({"stack_trace", "nn_module_stack", "fwd_nn_module_stack", "original_aten"})  # alike in many nodes


def graph_to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """A graph as plain JSON data.

    Raises:
        NotReplayable: an argument is of a kind that cannot be written: a symbolic size, an object of the user's.
    """
    shared: dict[str, int] = {}
    table: list[Any] = []

    def share(value: Any) -> int:
        key = repr(value)
        if key not in shared:
            shared[key] = len(table)
            table.append(value)
        return shared[key]

    return {"nodes": [_node_to_json(gm, n, share) for n in gm.graph.nodes], "shared": table}


def _node_to_json(gm: fx.GraphModule, node: fx.Node, share: Callable[[Any], int]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": node.name, "op": node.op, "target": _encoded(node.target)}
    if node.op == "get_attr":
        out["attribute"] = _attribute(gm, str(node.target))
    out["args"] = [_encoded(a) for a in node.args]
    if node.kwargs:
        out["kwargs"] = {k: _encoded(v) for k, v in node.kwargs.items()}
    meta: dict[str, Any] = {}
    for key, value in node.meta.items():
        if key in _LEFT_OUT or key.startswith("memo"):
            continue
        try:
            meta[key] = {"shared": share(_encoded(value))} if key in _SHARED and value else _encoded(value)
        except NotReplayable:
            if key == "val":
                raise
    out["meta"] = meta
    return out


def _attribute(gm: fx.GraphModule, target: str) -> dict[str, Any]:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return {"graph": graph_to_json(value)} if isinstance(value, fx.GraphModule) else {"value": _encoded(value)}


def _encoded(value: Any) -> Any:
    """Plain values as they are; everything else as a dict with one key, which says what it is."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    for kind, encode in _ENCODERS:
        if isinstance(value, kind):
            return encode(value)
    if is_dataclass(value) and type(value).__module__ == _DESCRIPTORS:
        return {"descriptor": [type(value).__name__, {f.name: _encoded(getattr(value, f.name)) for f in fields(value)}]}
    module = getattr(value, "__module__", "") or ""
    if callable(value) and _is_known(module):
        return {"function": f"{module}:{value.__qualname__}"}
    raise NotReplayable(f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be written")


def _tensor(value: torch.Tensor) -> dict[str, Any]:
    shape, stride = [_number(s) for s in value.shape], [_number(s) for s in value.stride()]
    dtype = str(value.dtype).removeprefix("torch.")
    out: dict[str, Any] = {"tensor": [shape, stride, dtype, str(value.device)]}
    if value.requires_grad:
        out["requires_grad"] = True
    offset = value.storage_offset()
    return {**out, "offset": _number(offset)} if _number(offset) else out


def _number(value: Any) -> int:
    if isinstance(value, int):
        return value
    known = value.node.maybe_as_int()
    if known is None:
        raise NotReplayable(f"the size {value} is not a number: memo plans static shapes")
    return int(known)


def _float(value: float) -> Any:
    return value if math.isfinite(value) else {"float": str(value)}


def _op(value: torch._ops.OpOverload) -> dict[str, str]:
    return {"op": f"{value._schema.name.replace('::', '.')}.{value._overloadname}"}


_ENCODERS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (fx.Node, lambda v: {"node": v.name}),
    (torch.Tensor, _tensor),
    (torch.SymInt, _number),
    (Enum, lambda v: {"enum": [f"{type(v).__module__}:{type(v).__qualname__}", v.name]}),
    (int, int),
    (float, _float),
    (complex, lambda v: {"complex": [v.real, v.imag]}),
    (torch.Size, lambda v: {"tuple": [_number(s) for s in v]}),
    (tuple, lambda v: {"tuple": [_encoded(a) for a in v]}),
    (list, lambda v: [_encoded(a) for a in v]),
    (Mapping, lambda v: {"dict": [[_encoded(k), _encoded(a)] for k, a in v.items()]}),
    (slice, lambda v: {"slice": [_encoded(v.start), _encoded(v.stop), _encoded(v.step)]}),
    (torch.dtype, lambda v: {"torch": str(v)}),
    (torch.layout, lambda v: {"torch": str(v)}),
    (torch.memory_format, lambda v: {"torch": str(v)}),
    (torch.device, lambda v: {"device": str(v)}),
    (torch._ops.OpOverload, _op),
    (torch._ops.HigherOrderOperator, lambda v: {"higher_order": v.name()}),
    (type, lambda v: {"class": f"{v.__module__}.{v.__qualname__}"}),
)


def graph_from_json(data: Mapping[str, Any]) -> fx.GraphModule:
    """The graph that `graph_to_json` wrote, over fake tensors of a mode of its own.

    Raises:
        NotReplayable: the data names an op or a kind of value that this torch does not have.
    """
    return _graph(data, FakeTensorMode(allow_non_fake_inputs=True))


def _graph(data: Mapping[str, Any], mode: Any) -> fx.GraphModule:
    graph = fx.Graph()
    root = torch.nn.Module()
    nodes: dict[str, fx.Node] = {}
    for raw in data["nodes"]:
        decode = _Decoder(nodes, mode)
        target = decode(raw["target"])
        if raw["op"] == "get_attr":
            _attach(root, target, raw["attribute"], decode, mode)
        args = tuple(decode(a) for a in raw["args"])
        kwargs = {k: decode(v) for k, v in raw.get("kwargs", {}).items()}
        node = graph.create_node(raw["op"], target, args, kwargs, name=raw["name"])
        if node.name != raw["name"]:
            node._rename(raw["name"])
        for key, value in raw["meta"].items():
            shared = isinstance(value, dict) and "shared" in value
            node.meta[key] = decode(data["shared"][value["shared"]] if shared else value)
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])
        nodes[node.name] = node
    return fx.GraphModule(root, graph)


def _attach(root: torch.nn.Module, target: str, attribute: Mapping[str, Any], decode: _Decoder, mode: Any) -> None:
    *path, last = target.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    graph = attribute.get("graph")
    setattr(owner, last, _graph(graph, mode) if graph is not None else decode(attribute["value"]))


class _Decoder:
    """Reads values of one graph, whose nodes so far are known by name."""

    def __init__(self, nodes: Mapping[str, fx.Node], mode: Any) -> None:
        self.nodes, self.mode = nodes, mode

    def __call__(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self(v) for v in value]
        if not isinstance(value, dict):
            return value
        kind = next(iter(value))
        read = getattr(self, f"_{kind}", None)
        if read is None:
            raise NotReplayable(f"the dump holds a value of unknown kind {kind!r}")
        return read(value[kind]) if kind != "tensor" else self._tensor(value)

    def _node(self, name: str) -> fx.Node:
        return self.nodes[name]

    def _tensor(self, value: Mapping[str, Any]) -> torch.Tensor:
        shape, stride, dtype, device = value["tensor"]
        offset = value.get("offset", 0)
        kind = _torch_attribute(f"torch.{dtype}")
        with self.mode, torch.no_grad():
            made = torch.empty_strided(shape, stride, dtype=kind, device=device)
            if offset:
                room = offset + 1 + sum((s - 1) * t for s, t in zip(shape, stride, strict=True) if s)
                made = torch.empty(room, dtype=kind, device=device).as_strided(shape, stride, offset)
        return made.requires_grad_(True) if value.get("requires_grad") else made

    def _tuple(self, value: list[Any]) -> tuple[Any, ...]:
        return tuple(self(v) for v in value)

    def _dict(self, value: list[Any]) -> dict[Any, Any]:
        return {self(k): self(v) for k, v in value}

    def _slice(self, value: list[Any]) -> slice:
        return slice(*(self(v) for v in value))

    def _float(self, value: str) -> float:
        return float(value)

    def _complex(self, value: list[float]) -> complex:
        return complex(*value)

    def _torch(self, value: str) -> Any:
        return _torch_attribute(value)

    def _device(self, value: str) -> torch.device:
        return torch.device(value)

    def _class(self, value: str) -> str:
        return value  # the user's code is not here: its name is all that the passes read

    def _op(self, value: str) -> Any:
        found: Any = torch.ops
        for part in value.split("."):
            found = getattr(found, part, None)
            if found is None:
                raise NotReplayable(f"this torch has no op {value}")
        return found

    def _higher_order(self, value: str) -> Any:
        return _torch_attribute(f"torch.ops.higher_order.{value}")

    def _enum(self, value: list[str]) -> Any:
        return getattr(_known(value[0]), value[1])

    def _function(self, value: str) -> Any:
        return _known(value)

    def _descriptor(self, value: list[Any]) -> Any:
        name, inside = value
        return _known(f"{_DESCRIPTORS}:{name}")(**{k: self(v) for k, v in inside.items()})


def _torch_attribute(path: str) -> Any:
    found: Any = torch
    for part in path.split(".")[1:]:
        found = getattr(found, part, None)
        if found is None:
            raise NotReplayable(f"this torch has no {path}")
    return found


def _is_known(module: str) -> bool:
    return module.split(".")[0] in {"torch", "operator", "_operator", "math"}


def _known(path: str) -> Any:
    module, _, name = path.partition(":")
    if not _is_known(module):
        raise NotReplayable(f"the dump names {path}, which is not torch's: it is not loaded")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise NotReplayable(f"this torch has no {path}")
    return found
