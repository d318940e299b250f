"""`explain`: compiles a model without running a step, and says what was decided and why.

In the manner of `torch._dynamo.explain`, and for what is saved of JAX's `print_saved_residuals`. Each graph is planned
and placed as the backend would, from dry runs of Inductor; in its place stands a callable that returns zeros, so that
Dynamo goes on after a graph break.

Private torch APIs, tried with torch 2.13: `GraphModule.compile_subgraph_reason`, which Dynamo leaves on what it hands
to a backend.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch._guards import detect_fake_mode

from memo_compile.codegen.compiler import look
from memo_compile.errors import BudgetTooSmall
from memo_compile.options import Options
from memo_compile.passes.analysis.liveness import reaches_memory
from memo_compile.passes.fx.facts import MATMULS, is_view, nbytes, op_name, schema_name, source_line, storage_of
from memo_compile.planning.prepared import Prepared
from memo_compile.report.dumps import Dump
from memo_compile.report.explanation import (
    LARGEST,
    Break,
    Explanation,
    GraphExplained,
    LayerRow,
    SavedRow,
    TensorRow,
    Unsliced,
)
from memo_compile.report.groups import by_source, shares
from memo_compile.report.picture import layers_by_value
from memo_compile.runtime.ops import register
from memo_compile.schema import ActivationPlan, Cause, Plan
from memo_compile.versions import check_torch

MIN_SQUARE = 64  # a size below that makes no square worth a word


def explain(model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Compile `model(*args, **kwargs)` without running a step, and say what memo would do and why.

    Between graphs (after a graph break) the model's own Python runs on zeros: what depends on values may take
    another way there.

    Args:
        model: a module or function; called with `args` and `kwargs`, real or fake tensors.
        options: those of the backend. A budget that cannot be kept is reported, and the smallest plan explained.

    Raises:
        MemoError: a mistake in the options.
    """
    check_torch()
    parsed = Options.parse(options)
    register()
    graphs: list[GraphExplained] = []
    breaks: list[Break] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            frame = reason.user_stack[-1] if reason.user_stack else None
            where = f"{frame.filename}:{frame.lineno}: {frame.line}" if frame is not None else ""
            breaks.append(Break(str(reason.reason).strip().splitlines()[0], where))
        stand_in = _zeros_for(gm)
        graphs.append(_explained(gm, inputs, parsed, f"graph {len(graphs)}"))
        return stand_in

    torch._dynamo.reset()
    try:
        torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    return Explanation(tuple(graphs), tuple(breaks))


def _zeros_for(gm: fx.GraphModule) -> Callable[..., Any]:
    """A callable with the graph's signature, which returns its inputs where it would, and zeros elsewhere."""
    (output,) = gm.graph.find_nodes(op="output")
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    place = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}

    def run(*inputs: Any) -> tuple[Any, ...]:
        mode = detect_fake_mode(inputs)

        def made(result: Any) -> Any:
            if not isinstance(result, fx.Node):
                return result
            if result in place:
                return inputs[place[result]]
            value = result.meta["example_value"]
            if not isinstance(value, torch.Tensor):
                return int(value) if isinstance(value, torch.SymInt) else value
            shape, stride = [int(s) for s in value.shape], [int(s) for s in value.stride()]
            zeros = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device).zero_()
            return zeros.requires_grad_(value.requires_grad)

        if mode is None:
            return tuple(made(r) for r in results)
        with mode:
            return tuple(made(r) for r in results)

    return run


def _explained(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, name: str) -> GraphExplained:
    refused = ""
    spare = copy.deepcopy(gm)
    try:
        found = look(gm, inputs, options, Dump.open)
    except BudgetTooSmall as error:
        refused = str(error)
        found = look(spare, inputs, replace(options, memory_budget="min"), Dump.open)
    if found is None:
        return GraphExplained(
            name=name,
            nodes=len(gm.graph.nodes),
            plan=None,
            refused="",
            largest=(),
            saved=(),
            inputs_read=0,
            inputs_bytes=0,
            layers=(),
            unsliced=(),
        )
    plan, p = found.plan, found.prepared
    held = [n for n in p.backward.graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
    given = {n.name for n in p.joint.graph.find_nodes(op="placeholder")}
    theirs = [n for n in held if n.name in given]
    return GraphExplained(
        name=name,
        nodes=len(p.joint.graph.nodes),
        plan=plan,
        refused=refused,
        largest=largest_tensors(p),
        saved=saved_rows(p, plan),
        inputs_read=len(theirs),
        inputs_bytes=sum(nbytes(n) for n in theirs),
        layers=layer_rows(p, plan),
        unsliced=unsliced_rows(plan),
    )


def largest_tensors(p: Prepared) -> tuple[TensorRow, ...]:
    """The largest tensors of both graphs as they would run unplanned, those of one source line in one row."""
    square = _squares(p)
    groups: dict[tuple[str, tuple[int, ...], str], list[fx.Node]] = defaultdict(list)
    seen: set[str] = set()
    for graph in (p.unplanned.forward.graph, p.unplanned.backward.graph):
        for n in graph.nodes:
            made_here = n.op == "call_function" and storage_of(n) is n and not is_view(n) and n.name not in seen
            if made_here and nbytes(n) and (not p.fused or reaches_memory(n)):
                seen.add(n.name)
                groups[source_line(n), _shape(n), _dtype(n)].append(n)
    ranked = sorted(groups.items(), key=lambda item: (-nbytes(item[1][0]), -len(item[1]), item[1][0].name))
    rows: list[TensorRow] = []
    for (source, shape, dtype), nodes in ranked:
        first = nodes[0]
        quadratic = any(n.name in square for n in nodes)
        if len(rows) < LARGEST or quadratic:
            rows.append(
                TensorRow(
                    name=first.name,
                    op=op_name(first),
                    shape=shape,
                    dtype=dtype,
                    bytes=nbytes(first),
                    count=len(nodes),
                    source=source,
                    quadratic=quadratic,
                )
            )
    return tuple(rows[: 2 * LARGEST])


def _data_sizes(p: Prepared) -> set[int]:
    """Sizes of the leading dimensions of what looks like data: the number of tokens, and of integer inputs the rest."""
    sizes = {p.tokens.tokens}
    for n in p.joint.graph.find_nodes(op="placeholder"):
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            sizes.update(int(s) for s in value.shape)
    return {s for s in sizes if s >= MIN_SQUARE}


def _squares(p: Prepared) -> set[str]:
    """Values in whose shape a size of the data stands twice, such as S × S masks and scores.

    A width that happens to equal the number of tokens makes no square: the last dimension of a matmul with a parameter
    is the parameter's, and so is a gradient's shape.
    """
    sizes = _data_sizes(p)
    parameters = [n for n in p.joint.graph.find_nodes(op="placeholder") if nbytes(n)]
    floating = {n for n in parameters if n.meta["val"].is_floating_point()}
    theirs = {tuple(sorted(_shape(n))) for n in floating}
    widths: set[fx.Node] = set()
    found: set[str] = set()
    for n in p.joint.graph.nodes:
        if n.op != "call_function" or not nbytes(n) or not any(_shape(n).count(s) >= 2 for s in sizes):
            continue
        matmul = schema_name(n) in MATMULS
        if (matmul and storage_of(n.all_input_nodes[-1]) in floating) or widths.intersection(n.all_input_nodes):
            widths.add(n)
        elif tuple(sorted(_shape(n))) not in theirs:
            found.add(n.name)
    return found


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def saved_rows(p: Prepared, plan: Plan) -> tuple[SavedRow, ...]:
    """What is saved and who reads it in the backward, most bytes first."""
    readers = {n.name: _readers(n) for n in p.backward.graph.find_nodes(op="placeholder")}
    rows = []
    for group in by_source(plan):
        first = group[0]
        rows.append(
            SavedRow(
                first.name,
                first.shape,
                first.dtype,
                first.bytes,
                len(group),
                *shares(group),
                first.source,
                readers.get(first.name, ()),
                first.reason,
            )
        )
    return tuple(sorted(rows, key=lambda r: (-r.bytes * r.count, r.name)))


def _readers(node: fx.Node) -> tuple[str, ...]:
    """The ops that read a value, views followed, each once."""
    found: dict[str, None] = {}
    stack = list(node.users)
    while stack:
        user = stack.pop(0)
        if is_view(user) or user.target is operator.getitem:
            stack += list(user.users)
        elif user.op == "call_function":
            found[op_name(user).removeprefix("aten.").removesuffix(".default")] = None
    return tuple(found)


def layer_rows(p: Prepared, plan: Plan) -> tuple[LayerRow, ...]:
    """Residency of each class of layers, in the forward's order; what lies outside of all layers comes last."""
    modules = layers_by_value(p)
    outside = len(p.layers.classes)
    groups: dict[int, list[ActivationPlan]] = defaultdict(list)
    for a in plan.activations:
        groups[outside if a.layer is None else p.layers.classes[a.layer]].append(a)
    rows = []
    for cls, group in sorted(groups.items()):
        names = Counter(modules[a.name][0] for a in group if a.name in modules)
        name = min(names, key=lambda n: (-names[n], n)).rpartition("].")[2] if names else f"class {cls}"
        count = p.layers.classes.count(cls) if cls < outside else 1
        title = "outside of layers" if cls == outside else name
        rows.append(LayerRow(title, count, sum(a.bytes for a in group), *shares(group)))
    return tuple(rows)


def unsliced_rows(plan: Plan) -> tuple[Unsliced, ...]:
    """Saved activations that have one home, and those whose rows cannot be recomputed alone; small ones left out."""
    groups: dict[tuple[str, Cause, str], list[ActivationPlan]] = defaultdict(list)
    for a in plan.activations:
        if a.cause is not Cause.SLICED and not a.cause.keeps:
            groups[a.source, a.cause, a.detail].append(a)
    rows = [
        Unsliced(group[0].name, sum(a.bytes for a in group), len(group), source, group[0].reason)
        for (source, _, _), group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda r: (-r.bytes, r.name)))
