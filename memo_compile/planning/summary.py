"""What a plan says: of each activation its home and why, and figures of the whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx as fx

from memo_compile.passes.analysis.peak_tensors import obstacles
from memo_compile.passes.analysis.tokens import TokenInfo
from memo_compile.passes.fx.facts import (
    nbytes,
    source_line,
)
from memo_compile.passes.fx.meta import LAYER, TOKENS
from memo_compile.passes.transforms.homes import Homes
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import SMALL, Limits
from memo_compile.schema import ActivationPlan, Plan, Stop


def recomputed_flops(p: Prepared, homes: Mapping[str, Homes]) -> int:
    total = 0.0
    for key, h in homes.items():
        chain = p.chains[key]
        if h.recomputed and chain is not None:
            total += sum(p.flops.get(n.name, 0) for n in chain) * h.recomputed / h.tokens
    return int(total)


def largest_at_peak(p: Prepared) -> tuple[str, ...]:
    split = p.unplanned
    return obstacles(split.forward, split.backward, frozenset(split.saved), makers_of(p), p.fused)


def makers_of(p: Prepared) -> dict[str, fx.Node]:
    return {n.name: n for n in p.joint.graph.nodes}


def blank_plan(p: Prepared, limits: Limits, name: str, backend: str) -> Plan:
    forward = {n.name for n in p.forward.graph.nodes}
    return Plan(
        name=name,
        backend=backend,
        budget=limits.budget,
        predicted_peak=p.unplanned_peak,
        least_peak=0,
        unplanned_peak=p.unplanned_peak,
        predicted_seconds=0.0,
        host_bytes=0,
        forward_flops=p.forward_flops,
        recomputed_flops=0,
        solver="none: everything fits",
        seconds=0.0,
        binding="nothing",
        token_axis=str(p.tokens.axis),
        activations=(),
        stops=tuple(Stop(s.node, s.op, s.source, s.reason) for s in p.tokens.stops if s.node in forward),
    )


def activation_plans(p: Prepared, homes: Mapping[str, Homes], limits: Limits) -> tuple[ActivationPlan, ...]:
    plans = []
    for node in p.saved:
        if node.op == "placeholder" or not nbytes(node):
            continue
        home = homes.get(node.name)
        if home is not None:
            plans.append(activation_plan(node, home, _reason(p, node, home, limits)))
            continue
        small = nbytes(node) < SMALL
        if node.name in p.policies.saved:
            reason = "kept: a policy of the user's checkpoints says so"
            plans.append(activation_plan(node, Homes(1, 1, 0, 0, None), reason))
            continue
        reason = f"kept: below {SMALL} bytes" if small else "kept: its storage is an output's or another value's"
        plans.append(activation_plan(node, Homes(1, 1, 0, 0, None), reason))
    return tuple(plans)


def _reason(p: Prepared, node: fx.Node, home: Homes, limits: Limits) -> str:
    if node.name in p.policies.offloaded:
        return "offloaded: a policy of the user's checkpoints says so"
    if home.axis is None:
        return "whole: no token axis reaches it"
    if p.chains[node.name] is None and limits.recompute:
        return "sliced; not recomputed: its last bits decide something, or it must not run twice"
    info: TokenInfo = node.meta[TOKENS]
    return "sliced" if info.sliceable else f"sliced; recomputed whole or not at all: {info.reason}"


def activation_plan(node: fx.Node, home: Homes, reason: str) -> ActivationPlan:
    value = node.meta["val"]
    return ActivationPlan(
        node.name,
        tuple(int(s) for s in value.shape),
        str(value.dtype).removeprefix("torch."),
        nbytes(node),
        source_line(node),
        home.tokens,
        home.kept,
        home.offloaded,
        home.recomputed,
        reason,
        node.meta[LAYER].index if LAYER in node.meta else None,
    )
