"""Dry runs of what was decided: what Inductor would emit for both graphs, and the arena that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from memo_compile.codegen.arena.layout import CHUNK, ArenaLayout, Link, plan_arena
from memo_compile.codegen.arena.sides import key_of
from memo_compile.codegen.arrange import Arrangement, arrangement_of, rearranged, step_seconds
from memo_compile.codegen.donation import donating
from memo_compile.codegen.emitted.body import Body, Kind
from memo_compile.codegen.inductor import settings_for
from memo_compile.codegen.lowered import Lowered, may_go_on
from memo_compile.codegen.lowerings import POISON
from memo_compile.codegen.preview import dry_emission
from memo_compile.codegen.tile_bodies import count_scratch
from memo_compile.codegen.wrapper import Emission
from memo_compile.passes.fx.facts import nbytes
from memo_compile.passes.fx.mutations import num_mutated_outputs
from memo_compile.passes.transforms.fewer_layers import with_fewer_layers
from memo_compile.passes.transforms.partition import Split, received
from memo_compile.planning.decide import CarriedOut, Decided
from memo_compile.planning.prepared import Prepared, graph_peak, held_between
from memo_compile.schema import Side
from memo_compile.trace.setting import Setting

FEW = (3, 4)  # layers of a deep stack, of which dry runs tell what one more adds
UNLIMITED = 1 << 62  # CUDA's caching allocator hands large blocks out again


@dataclass(frozen=True)
class Evidence:
    """What a dry run of both graphs showed, and where their buffers would lie.

    `arrangement` says how lines were moved so that copies overlap, None where they stand as Inductor has them.
    `seconds` is a replay of both; None where nothing is moved to the host and back. `lowered` is what the compilations
    of the two can go on with.
    """

    forward: Body
    backward: Body
    layout: ArenaLayout
    arrangement: Arrangement | None = None
    seconds: float | None = None
    lowered: tuple[Lowered | None, Lowered | None] = field(default=(None, None), compare=False, repr=False)


def gone_on_with(evidence: Evidence, backward: bool) -> Evidence:
    """The same without what the compilation of one of the graphs goes on with: that may be done once."""
    front, back = evidence.lowered
    return replace(evidence, lowered=(front, None) if backward else (None, back))


@dataclass(frozen=True)
class Rehearsal:
    """All that dry runs of one joint graph's decisions need.

    `budget` is what slices that land early may use up, in bytes; None for no limit. `static` are indices of inputs at
    fixed addresses, `layers` the layer of each node of the joint graph that has one. With `scalar` no vector code is
    generated, which is sooner done. `ranged` is for graphs whose sizes are symbols: lines stand as Inductor has them.
    `calls` are outstanding at once. With `goes_on` the compilation goes on with the dry run of what is taken, so that
    these are whole. `unplanned` is the forward of torch's own split and what its dry run showed.
    """

    setting: Setting
    num_user_outputs: int
    num_forward_outputs: int
    static: tuple[int, ...]
    layers: Mapping[str, int]
    scalar: bool
    budget: int | None = None
    ranged: bool = False
    calls: int = 1
    goes_on: bool = False
    unplanned: tuple[fx.GraphModule, Evidence] | None = None

    def with_unplanned(self, p: Prepared, *, likely: bool) -> tuple[Rehearsal, int]:
        """The same with a dry run of Inductor's own two graphs, and what they would hold in an arena.

        Where it is `likely` that these are taken, the compilation can go on with them. Else a deep stack is not
        looked at whole: what three and four of its layers hold tells what each of the others adds.
        """
        split = p.unplanned
        peak = None if likely else self._unplanned_by_few_layers(p)
        if peak is not None:
            return self, peak
        compared = replace(self, goes_on=self.goes_on and likely)
        evidence = compared.dry(CarriedOut(forward=split.forward, backward=split.backward, saved=split.saved))
        return replace(self, unplanned=(split.forward, evidence)), evidence.layout.peak

    def _unplanned_by_few_layers(self, p: Prepared) -> int | None:
        """What Inductor's own graphs would hold, told by dry runs of a few layers; None where no stack is deep.

        Each layer adds the same, if it does so by the model.
        """
        fewer = [with_fewer_layers(p.unplanned, p.unplanned_layers, left) for left in FEW]
        modelled = [self._modelled(p, split) for split in fewer if split is not None]
        left_out = p.unplanned_layers.deepest - FEW[-1]
        if len(modelled) < len(FEW) or p.unplanned_peak != modelled[1] + left_out * (modelled[1] - modelled[0]):
            return None
        alone = replace(self, goes_on=False)
        less, more = (
            alone.dry(CarriedOut(forward=s.forward, backward=s.backward, saved=s.saved)).layout.peak
            for s in fewer
            if s is not None
        )
        return more + left_out * (more - less)

    def _modelled(self, p: Prepared, split: Split) -> int:
        peak = graph_peak(split.forward, split.backward, split.saved, p.num_forward_outputs, p.fused)
        return peak + (self.calls - 1) * held_between(split.forward)

    def looked_at(self, decided: Decided) -> tuple[int, Evidence]:
        """The peak of what was decided, and what shows it."""
        if self.setting.options.verify == "poison":
            for node in (*decided.forward.graph.nodes, *decided.backward.graph.nodes):
                node.meta[POISON] = True
        elif self.unplanned is not None and decided.forward is self.unplanned[0]:
            return self.unplanned[1].layout.peak, self.unplanned[1]
        evidence = self.dry(decided)
        return evidence.layout.peak, evidence

    def dry(self, decided: CarriedOut) -> Evidence:
        """Dry runs of both graphs, and the arena that they would have."""
        self.setting.progress.step("looking at what Inductor would emit")
        for graph in (decided.forward, decided.backward):
            count_scratch(graph)
        with settings_for(decided, decided.forward):
            forward = dry_emission(
                decided.forward,
                is_backward=False,
                user_visible=self._user_visible(decided.forward),
                static_inputs=self.static,
                **self._how(),
            )
            backward = self._dry_backward(decided, forward.body)
        layout, lowered = self.layout(decided, forward.body, backward.body), (forward.lowered, backward.lowered)
        plain = Evidence(forward.body, backward.body, layout, lowered=lowered)
        if self.ranged or not any(h.offloaded for h in decided.residency.values()):
            return plain
        plain = replace(plain, seconds=step_seconds((forward, backward), self.setting.profile))
        return plain if decided.overlap else self._overlapping(decided, forward, backward, plain)

    def _overlapping(self, decided: CarriedOut, forward: Emission, backward: Emission, plain: Evidence) -> Evidence:
        """The same with transfers moved so that they overlap, if the arena holds no more for it."""
        profile, links = self.setting.profile, links_of(decided, self.num_forward_outputs)
        arrangement = arrangement_of(forward, backward, profile, links, self.num_forward_outputs)
        front = rearranged(forward, arrangement.lines(forward, backward=False))
        back = rearranged(backward, arrangement.lines(backward, backward=True))
        layout = self.layout(decided, front.body, back.body)
        if layout.peak > plain.layout.peak:
            return plain
        seconds = step_seconds((front, back), profile)
        return Evidence(front.body, back.body, layout, arrangement, seconds, plain.lowered)

    def layout(self, decided: CarriedOut, forward: Body, backward: Body) -> ArenaLayout:
        """Where the buffers of two bodies lie."""
        arguments = self.arena_arguments(decided, forward, backward)
        plain = plan_arena(**arguments)
        if not backward.prefetch_buffers or not decided.overlap:
            return plain
        # Where it costs nothing, or the budget has room, slices land in storages that a call before can take.
        alone = plan_arena(**arguments, alone=frozenset(backward.prefetch_buffers))
        budget = self.budget if self.budget is not None else plain.peak
        return alone if alone.peak <= max(plain.peak, budget) else plain

    def arena_arguments(self, decided: CarriedOut, forward: Body, backward: Body) -> dict[str, Any]:
        """What `plan_arena` is given."""
        placeholders = decided.backward.graph.find_nodes(op="placeholder")
        return {
            "forward": forward,
            "backward": backward,
            "links": links_of(decided, self.num_forward_outputs),
            "user_outputs": self.num_forward_outputs,
            "tangents": {n.name: nbytes(n) for n in placeholders if "tangents" in str(n.target)},
            "calls": self.calls,
            "chunk": CHUNK if self.setting.device.type == "cpu" else UNLIMITED,
            "allocator": self.setting.allocator,
            "layer_of": self._layer_of(Side.FORWARD, forward) | self._layer_of(Side.BACKWARD, backward),
        }

    def _layer_of(self, side: Side, body: Body) -> dict[str, int]:
        """The layer of each buffer that a node of one makes; its forward and its backward count as two."""
        return {
            key_of(side, name): 2 * self.layers[origin] + (side is Side.BACKWARD)
            for name, origin in body.origins.items()
            if origin in self.layers
        }

    def _dry_backward(self, decided: CarriedOut, forward: Body) -> Emission:
        from torch._inductor.utils import count_tangents  # loads Inductor

        links = links_of(decided, self.num_forward_outputs)
        strides = {link.input: forward.strides[link.output] for link in links}
        (output,) = decided.backward.graph.find_nodes(op="output")
        with settings_for(decided, decided.backward), donating(donatable(decided, forward, self.num_forward_outputs)):
            return dry_emission(
                decided.backward,
                is_backward=True,
                user_visible=[i for i, n in enumerate(output.args[0]) if isinstance(n, fx.Node)],
                static_inputs=range(count_tangents(decided.backward)),
                input_strides={name: s for name, s in strides.items() if s is not None},
                **self._how(),
            )

    def _how(self) -> dict[str, Any]:
        keep = self.goes_on and not self.ranged and may_go_on()
        return {"scalar": self.scalar and not keep, "device": self.device_name(), "keep": keep}

    def device_name(self) -> str:
        """The device that is planned for, as Inductor names it."""
        device = self.setting.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return str(device)

    def _user_visible(self, forward: fx.GraphModule) -> list[int]:
        first = num_mutated_outputs(forward)
        (output,) = forward.graph.find_nodes(op="output")
        shown = range(first, first + self.num_user_outputs)
        return [i for i in shown if isinstance(output.args[0][i], fx.Node)]


def links_of(decided: CarriedOut, num_forward_outputs: int) -> tuple[Link, ...]:
    """Which forward output is which backward input: saved values come first among these."""
    inputs = received(decided.backward, len(decided.saved))
    return tuple(Link(num_forward_outputs + i, node.name) for i, node in enumerate(inputs))


def donatable(decided: CarriedOut, forward: Body, num_forward_outputs: int) -> list[int]:
    """Backward inputs into whose bytes the backward may write once it has read them: memo's own, and no one else's."""
    for_user = set(forward.outputs[:num_forward_outputs])
    storages = forward.outputs[num_forward_outputs : num_forward_outputs + len(decided.saved)]
    positions = {n.name: i for i, n in enumerate(decided.backward.graph.find_nodes(op="placeholder"))}
    return [
        positions[node.name]
        for node, name in zip(received(decided.backward, len(storages)), storages, strict=True)
        if name is not None
        and forward.storages[name].kind == Kind.ALLOCATED
        and name not in for_user
        and storages.count(name) == 1
    ]
