"""The order of the passes, read from top to bottom: what annotates a joint graph, and what acts on a decision.

An entry is a name and a pass; a pass is a file of that name in `analysis` or `transforms`. An annotating pass works on
the joint graph and returns what it found, under its name, to those after it. An acting pass takes the two graphs and
returns them rewritten. Planning, dumps and `memo replay` run these lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

from memo_compile.hardware.profiles import DeviceProfile
from memo_compile.passes.analysis.bit_sensitive import deciding
from memo_compile.passes.analysis.costs import Timer, graph_costs
from memo_compile.passes.analysis.layers import annotate_layers
from memo_compile.passes.analysis.liveness import lifetimes
from memo_compile.passes.analysis.recompute_chains import recompute_chains
from memo_compile.passes.analysis.tokens import annotate_tokens
from memo_compile.passes.analysis.user_checkpoints import policies_of
from memo_compile.passes.transforms.attention import write_over_attention_inputs
from memo_compile.passes.transforms.causal_masks import say_causal
from memo_compile.passes.transforms.fewer_layers import named_layers
from memo_compile.passes.transforms.masks import share_masks
from memo_compile.passes.transforms.matmuls import keep_early_matmuls
from memo_compile.passes.transforms.offloads import schedule_offloads
from memo_compile.passes.transforms.partition import Split, split_saving
from memo_compile.passes.transforms.prefetches import schedule_prefetches
from memo_compile.passes.transforms.refetches import fetch_again
from memo_compile.passes.transforms.residency import Residency
from memo_compile.passes.transforms.row_gradients import add_rows_in_place
from memo_compile.passes.transforms.saved_set import saved_set
from memo_compile.passes.transforms.scattered_sums import put_each_term
from memo_compile.passes.transforms.shared_heads import share_heads
from memo_compile.passes.transforms.slices import Sliced, apply_residency
from memo_compile.passes.transforms.sums import add_as_they_come
from memo_compile.passes.transforms.tile_bodies import Accumulate
from memo_compile.passes.transforms.tile_places import write_over_operands
from memo_compile.passes.transforms.tiles import tile_regions
from memo_compile.passes.transforms.true_layouts import tell_true_layouts
from memo_compile.passes.transforms.unplanned import unplanned

Rewrite = Callable[[fx.GraphModule], fx.GraphModule]


@dataclass(frozen=True)
class Joint:
    """A joint graph, and what comes with it.

    Args:
        inputs: the graph's inputs, as the partitioner got them.
        static_inputs: indices of the inputs that are parameters or buffers.
        profile: the device that the costs are of.
        fused: whether a fusing compiler runs the graphs.
        timer: seconds of nodes that were measured on a device, as `graph_costs` takes them.
        workspaces: notes on a graph's nodes what their kernels take for themselves.
    """

    graph: fx.GraphModule
    inputs: Any
    num_forward_outputs: int
    static_inputs: list[int] | None
    profile: DeviceProfile
    fused: bool
    timer: Timer | None
    workspaces: Rewrite

    @property
    def data_inputs(self) -> list[fx.Node]:
        """Inputs that are no parameters: what torch does not hold at fixed addresses."""
        static = set(self.static_inputs or ())
        placeholders = [n for n in self.graph.graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
        return [n for i, n in enumerate(placeholders) if i not in static]


Found = Mapping[str, Any]

ANNOTATING: tuple[tuple[str, Callable[[Joint, Found], Any]], ...] = (
    ("true_layouts", lambda j, _: _nothing_found(tell_true_layouts(j.graph) if j.fused else j.graph)),
    ("user_checkpoints", lambda j, _: policies_of(j.graph)),
    (
        "unplanned",
        lambda j, f: unplanned(j.graph, j.inputs, j.num_forward_outputs, j.static_inputs, f["user_checkpoints"]),
    ),
    ("fewer_layers", lambda j, _: named_layers(j.graph)),
    ("sums", lambda j, _: _nothing_found(add_as_they_come(j.graph) if j.fused else j.graph)),
    ("scattered_sums", lambda j, _: _nothing_found(put_each_term(j.graph))),
    ("causal_masks", lambda j, _: _nothing_found(say_causal(j.graph))),
    ("shared_heads", lambda j, _: _nothing_found(share_heads(j.graph))),
    ("tokens", lambda j, _: annotate_tokens(j.graph, j.data_inputs)),
    ("layers", lambda j, _: annotate_layers(j.graph)),
    ("saved_set", lambda j, f: saved_set(j.graph, f["unplanned"], f["user_checkpoints"])),
    ("workspaces", lambda j, f: _annotated(j.workspaces, f["unplanned"].split, f["saved_set"].split)),
    (
        "costs",
        lambda j, f: graph_costs(j.graph, j.profile, fused=j.fused, written=f["saved_set"].values, timer=j.timer),
    ),
    (
        "recompute_chains",
        lambda j, f: recompute_chains(j.graph, f["saved_set"].values, deciding(f["saved_set"].split.backward)),
    ),
)


@dataclass(frozen=True)
class Tiling:
    """Regions around values of at least `wide` bytes run in about `tiles` tiles, sums are added up in `accumulate`."""

    tiles: int
    wide: int
    accumulate: Accumulate = "float32"

    def applied(self, forward: fx.GraphModule, backward: fx.GraphModule, *, fused: bool) -> None:
        """Rewrite both graphs of a split, in place."""
        for side, gm in (("forward", forward), ("backward", backward)):
            name = f"memo_tiled_{side}"
            tile_regions(gm, self.tiles, self.wide, fused=fused, prefix=name, accumulate=self.accumulate)
            write_over_operands(gm, fused=fused)


@dataclass(frozen=True)
class Decision:
    """What acting passes carry out. With `overlap`, transfers run beside the computation; without, at once."""

    joint: fx.GraphModule
    saved: tuple[fx.Node, ...]
    residency: Mapping[str, Residency]
    host_budget: int
    overlap: bool
    seconds: Callable[[fx.Node], float]
    profile: DeviceProfile
    fused: bool
    workspaces: Rewrite
    tiling: Tiling | None = None

    @property
    def recomputed_whole(self) -> frozenset[str]:
        """What is not saved at all."""
        return frozenset(name for name, home in self.residency.items() if home.recomputed == home.tokens)

    def live(self, graph: fx.GraphModule, saved: tuple[str, ...]) -> list[int]:
        """Bytes live at each node."""
        return lifetimes(graph, fused=self.fused, owned_inputs=frozenset(saved)).live_bytes()


ACTING: tuple[tuple[str, Callable[[Decision, Any], Split | Sliced]], ...] = (
    ("partition", lambda d, g: _partitioned(d, g)),
    ("slices", lambda d, g: _sliced(d, g)),
    ("masks", lambda d, g: _each(share_masks, g) if d.fused else g),
    ("attention", lambda d, g: _each(write_over_attention_inputs, g) if d.fused else g),
    ("tiles", lambda d, g: _tiled(d, g)),
    ("row_gradients", lambda d, g: replace(g, backward=add_rows_in_place(g.backward))),
    ("offloads", lambda d, g: _with_offloads(d, g)),
    ("refetches", lambda d, g: g if d.overlap else _with_refetches(d, g)),
    ("prefetches", lambda d, g: _with_prefetches(d, g)),
    ("matmuls", lambda d, g: replace(g, backward=keep_early_matmuls(g.backward))),
    ("workspaces", lambda d, g: _each(d.workspaces, g)),
)

Graphs = Mapping[str, fx.GraphModule]
Watch = Callable[[str, Graphs, Any], None]
"""Is shown the graphs after a pass, with the pass's name and what it found; the next pass rewrites them in place."""


def unwatched(name: str, graphs: Graphs, found: Any) -> None:
    """Nobody looks on."""


def annotate(joint: Joint, watch: Watch = unwatched) -> Found:
    """Run the annotating passes; returns what each found, by its name."""
    found: dict[str, Any] = {}
    for name, run in ANNOTATING:
        found[name] = run(joint, found)
        watch(name, {"joint": joint.graph}, found[name])
    return found


def act(decision: Decision, unplanned: Split, watch: Watch = unwatched) -> Sliced:
    """Run the acting passes, from torch's split to graphs that carry the decision out."""
    graphs: Any = unplanned
    for name, run in ACTING:
        graphs = run(decision, graphs)
        watch(name, {"forward": graphs.forward, "backward": graphs.backward}, None)
    assert isinstance(graphs, Sliced)
    return graphs


def _nothing_found(_: fx.GraphModule) -> None:
    pass


def _partitioned(d: Decision, unplanned: Split) -> Split:
    dropped = d.recomputed_whole
    return split_saving(d.joint, [n for n in d.saved if n.name not in dropped], unplanned.num_forward_outputs)


def _sliced(d: Decision, split: Split) -> Sliced:
    dropped = d.recomputed_whole
    return apply_residency(d.joint, split, {k: h for k, h in d.residency.items() if k not in dropped}, d.host_budget)


def _tiled(d: Decision, g: Sliced) -> Sliced:
    if d.tiling is not None:
        d.tiling.applied(g.forward, g.backward, fused=d.fused)
    return g


def _with_offloads(d: Decision, g: Sliced) -> Sliced:
    most = 0 if d.overlap else max(d.live(g.backward, g.saved), default=0)
    live = d.live(g.forward, g.saved)
    forward = schedule_offloads(g.forward, d.seconds, d.profile.d2h, overlap=d.overlap, live=live, most=most)
    return replace(g, forward=forward)


def _with_refetches(d: Decision, g: Sliced) -> Sliced:
    least = max(d.live(g.forward, g.saved), default=0)
    return replace(g, backward=fetch_again(g.backward, d.live(g.backward, g.saved), least))


def _with_prefetches(d: Decision, g: Sliced) -> Sliced:
    live = d.live(g.backward, g.saved)
    backward = schedule_prefetches(g.backward, d.seconds, d.profile.h2d, overlap=d.overlap, live=live)
    return replace(g, backward=backward)


def _annotated(workspaces: Rewrite, *splits: Split) -> None:
    for split in splits:
        workspaces(split.forward)
        workspaces(split.backward)


def _each(rewrite: Rewrite, g: Sliced) -> Sliced:
    return replace(g, forward=rewrite(g.forward), backward=rewrite(g.backward))
