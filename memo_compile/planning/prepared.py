"""A joint graph with all that the passes found out about it, which no decision changes.

Pure: nothing is compiled, no tensor data is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.fx as fx

from memo_compile.hardware.profiles import DeviceProfile
from memo_compile.logs import logger
from memo_compile.passes.analysis.costs import Cost, Timer
from memo_compile.passes.analysis.layers import LayerReport
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.analysis.tokens import TokenReport
from memo_compile.passes.analysis.user_checkpoints import Policies
from memo_compile.passes.fx.facts import (
    is_seed,
    nbytes,
    storage_of,
)
from memo_compile.passes.pipeline import Joint, Tiling, Watch, annotate, unwatched
from memo_compile.passes.transforms.fewer_layers import NamedLayers
from memo_compile.passes.transforms.partition import (
    Split,
    order_backward,
)
from memo_compile.passes.transforms.saved_set import SavedSet
from memo_compile.workspaces.annotate import Workspaces

log = logger(__name__)

SMALLEST = 256  # bytes of a gradient of a result that counts
DRAWN_AGAIN = (
    "by a policy of torch.utils.checkpoint random numbers must be drawn again (MUST_RECOMPUTE), and only torch's own "
    "split draws the same; leave them out of the policy (PREFER_RECOMPUTE), and they are planned"
)


@dataclass(frozen=True)
class Prepared:
    """A joint graph with everything found out about it that no decision changes.

    `forward` and `backward` are the split that saves `saved`, the canonical saved activations. `chains[name]` is what
    runs to recompute one from the others, None where it must not run twice. `plannable` is False where only torch's
    own split is right. `policies` are those of the user's own checkpoints; `workspaces` tells
    what kernels take for themselves. With `tiling`, both graphs have regions that run tile by tile (`planning.tiling`).
    `tilings` are those that were made of this one: seconds each, and asked for again and again.
    """

    joint: fx.GraphModule
    num_forward_outputs: int
    unplanned: Split
    unplanned_layers: NamedLayers
    saved: tuple[fx.Node, ...]
    tokens: TokenReport
    layers: LayerReport
    forward: fx.GraphModule
    backward: fx.GraphModule
    chains: Mapping[str, tuple[fx.Node, ...] | None]
    costs: Mapping[str, Cost]
    seconds: Mapping[str, float]
    flops: Mapping[str, int]
    fused: bool
    profile: DeviceProfile
    unplanned_peak: int
    forward_flops: int
    plannable: bool
    policies: Policies
    workspaces: Workspaces
    tiling: Tiling | None = None
    tilings: dict[Tiling, Prepared | None] = field(default_factory=dict, init=False, repr=False, compare=False)


def prepare(
    joint: fx.GraphModule,
    inputs: Any,
    num_forward_outputs: int,
    static_inputs: list[int] | None,
    profile: DeviceProfile,
    *,
    fused: bool,
    timer: Timer | None = None,
    workspaces: Workspaces | None = None,
    watch: Watch = unwatched,
) -> Prepared:
    """Annotate a joint graph: token axes, live ranges, costs, what may be recomputed and from what.

    Args:
        inputs: the joint graph's inputs, as the partitioner got them.
        static_inputs: indices of the inputs that are parameters or buffers.
        profile: the device that the costs are of.
        fused: whether a fusing compiler runs the graphs.
        timer: seconds of nodes that were measured on a device, as `graph_costs` takes them.
        workspaces: where to look for what kernels take for themselves; by default also by calling them.
        watch: is shown the joint graph after each pass, with the pass's name and what it found.
    """
    workspaces = workspaces or Workspaces(fused, low=profile.device == "cpu")
    state = Joint(
        graph=joint,
        inputs=inputs,
        num_forward_outputs=num_forward_outputs,
        static_inputs=static_inputs,
        profile=profile,
        fused=fused,
        timer=timer,
        workspaces=workspaces.annotate,
    )
    found = annotate(state, watch)
    unplanned: Split = found["unplanned"].split
    saved_set: SavedSet = found["saved_set"]
    costs: Mapping[str, Cost] = found["costs"]
    if not saved_set.plannable:
        log.warning("nothing is planned: %s", DRAWN_AGAIN)
    split = saved_set.split
    return Prepared(
        joint=joint,
        num_forward_outputs=num_forward_outputs,
        unplanned=unplanned,
        unplanned_layers=found["fewer_layers"],
        # Seeds are read by the backward only where a plan makes a draw again.
        saved=tuple(n for n in saved_set.values if n.name in split.saved or is_seed(n)),
        tokens=found["tokens"],
        layers=found["layers"],
        forward=split.forward,
        backward=order_backward(split.backward),
        chains=found["recompute_chains"],
        costs=costs,
        seconds={k: c.seconds for k, c in costs.items()},
        flops={k: int(c.flops) for k, c in costs.items()},
        fused=fused,
        profile=profile,
        unplanned_peak=graph_peak(
            unplanned.forward, unplanned.backward, unplanned.saved, num_forward_outputs, fused=fused
        ),
        forward_flops=sum(int(costs[n.name].flops) for n in split.forward.graph.nodes if n.name in costs),
        plannable=saved_set.plannable,
        policies=found["user_checkpoints"],
        workspaces=workspaces,
    )


def graph_peak(
    forward: fx.GraphModule, backward: fx.GraphModule, saved: tuple[str, ...], num_forward_outputs: int, fused: bool
) -> int:
    """The most bytes live at once while the two graphs run, in their own order: a model that the arena corrects."""
    front = lifetimes(forward, fused=fused)
    results = results_of(forward, num_forward_outputs)
    held = sum(nbytes(n) for n in results if n.op != "placeholder")
    inputs = {n.name for n in forward.graph.find_nodes(op="placeholder")}
    of_user = {n.name for n in forward.graph.nodes if storage_of(n) in results}
    # A saved value that is also a result, or a view of one, is the user's: it is counted once, as a result.
    owned = frozenset(saved) - inputs - of_user
    back = lifetimes(backward, fused=fused, owned_inputs=owned | tangents_of(backward))
    return max(max(front.live_bytes(), default=0), max(back.live_bytes(), default=0) + held)


def tangents_of(backward: fx.GraphModule) -> frozenset[str]:
    """Gradients of results that autograd hands to a backward, zeros where nobody used a result, by name.

    It lets go of them in the call. Scalars, from which it starts, are in no plan.
    """
    inputs = backward.graph.find_nodes(op="placeholder")
    return frozenset(n.name for n in inputs if "tangents" in str(n.target) and nbytes(n) >= SMALLEST)


def held_between(forward: fx.GraphModule) -> int:
    """Bytes that a call of a forward leaves on the device: its results, and what it keeps for its backward."""
    (output,) = forward.graph.find_nodes(op="output")
    storages = {storage_of(n) for n in output.args[0] if isinstance(n, fx.Node)}
    return sum(nbytes(s) for s in storages if s.op != "placeholder")


def of_calls(p: Prepared, calls: int) -> Prepared:
    """`p` with the unplanned peak of the last of so many calls, none of which has had its backward."""
    return replace(p, unplanned_peak=p.unplanned_peak + (calls - 1) * held_between(p.unplanned.forward))


def results_of(forward: fx.GraphModule, num_forward_outputs: int) -> set[fx.Node]:
    """The storages that the forward gives to the user."""
    (output,) = forward.graph.find_nodes(op="output")
    return {storage_of(n) for n in output.args[0][:num_forward_outputs] if isinstance(n, fx.Node)}


def step_seconds(p: Prepared, node: fx.Node) -> float:
    """Of a node of either graph. The backward's placeholders have names of what the forward computed, and are free."""
    return p.seconds.get(node.name, 0.0) if node.op == "call_function" else 0.0
