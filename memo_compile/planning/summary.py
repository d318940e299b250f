"""What a plan says: of each activation its home and why, and figures of the whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx as fx

from memo_compile.passes.analysis.peak_tensors import peak_tensors
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.facts import nbytes, source_line
from memo_compile.passes.fx.meta import LAYER, TOKENS
from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import SMALL, Limits
from memo_compile.schema import ActivationPlan, Binding, Cause, Plan, Stop


def recomputed_flops(p: Prepared, residency: Mapping[str, Residency]) -> int:
    total = 0.0
    for key, h in residency.items():
        chain = p.chains[key]
        if h.recomputed and chain is not None:
            total += sum(p.flops.get(n.name, 0) for n in chain) * h.recomputed / h.tokens
    return int(total)


def largest_at_peak(p: Prepared) -> tuple[str, ...]:
    split = p.unplanned
    return peak_tensors(split.forward, split.backward, frozenset(split.saved), makers_of(p), p.fused)


def makers_of(p: Prepared) -> dict[str, fx.Node]:
    return {n.name: n for n in p.joint.graph.nodes}


def blank_plan(p: Prepared, limits: Limits, name: str, backend: str) -> Plan:
    forward = {n.name for n in p.forward.graph.nodes}
    return Plan(
        name=name,
        backend=backend,
        budget=limits.budget,
        calls=limits.calls,
        predicted_peak=p.unplanned_peak,
        least_peak=0,
        unplanned_peak=p.unplanned_peak,
        predicted_seconds=0.0,
        host_bytes=0,
        forward_flops=p.forward_flops,
        recomputed_flops=0,
        solver="none: everything fits",
        seconds=0.0,
        binding=Binding.NOTHING,
        token_axis=str(p.tokens.axis),
        activations=(),
        stops=tuple(
            Stop(node=s.node, op=s.op, source=s.source, reason=s.reason) for s in p.tokens.stops if s.node in forward
        ),
    )


def activation_plans(p: Prepared, residency: Mapping[str, Residency], limits: Limits) -> tuple[ActivationPlan, ...]:
    plans = []
    for node in p.saved:
        if node.op == "placeholder" or not nbytes(node):
            continue
        home = residency.get(node.name)
        if home is not None:
            plans.append(activation_plan(node, home, *_cause(p, node, home, limits)))
            continue
        plans.append(activation_plan(node, Residency(1, 0, 0), *_why_kept(p, node)))
    return tuple(plans)


def _why_kept(p: Prepared, node: fx.Node) -> tuple[Cause, str]:
    """Of what no decision was taken on."""
    if node.name in p.policies.saved:
        return Cause.POLICY_KEPT, ""
    return (Cause.SMALL, f"{SMALL} bytes") if nbytes(node) < SMALL else (Cause.SHARED_STORAGE, "")


def _cause(p: Prepared, node: fx.Node, home: Residency, limits: Limits) -> tuple[Cause, str]:
    if node.name in p.policies.offloaded:
        return Cause.POLICY_OFFLOADED, ""
    if home.axis is None:
        return Cause.NO_TOKEN_AXIS, ""
    if p.chains[node.name] is None and limits.recompute:
        return Cause.SLICED_NOT_RECOMPUTED, ""
    info: TokenInfo = node.meta[TOKENS]
    return (Cause.SLICED, "") if info.sliceable else (Cause.SLICED_RECOMPUTED_WHOLE, info.reason)


def activation_plan(node: fx.Node, home: Residency, cause: Cause, detail: str = "") -> ActivationPlan:
    value = node.meta["val"]
    return ActivationPlan(
        name=node.name,
        shape=tuple(int(s) for s in value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        bytes=nbytes(node),
        source=source_line(node),
        tokens=home.tokens,
        kept=home.kept,
        offloaded=home.offloaded,
        recomputed=home.recomputed,
        cause=cause,
        detail=detail,
        layer=node.meta[LAYER].index if LAYER in node.meta else None,
    )
