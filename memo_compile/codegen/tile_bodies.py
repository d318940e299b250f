"""Compiles what runs for each tile of a region: by Inductor, once for all tiles and all regions that are alike.

Private torch APIs, tried with torch 2.13: `compile_fx_inner`.
"""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from memo_compile.codegen.donation import donating
from memo_compile.codegen.emitted.body import Kind
from memo_compile.codegen.preview import dry_run, twin_of
from memo_compile.passes.analysis.liveness import WORKSPACE
from memo_compile.passes.transforms.tile_bodies import Program, accumulator_bytes, bodies, inputs_of
from memo_compile.passes.transforms.tiles import places_of, program_in, programs_of
from memo_compile.placement.bounds import live_bytes
from memo_compile.runtime.tiles import compiled_bodies


def compile_bodies(gm: fx.GraphModule) -> None:
    """Compile the bodies of all tiled regions of a graph that this process has not compiled."""
    from torch._inductor.compile_fx import compile_fx_inner  # loads Inductor
    from torch._inductor.utils import BoxedBool

    for key in _bodies_in(gm):
        if key in compiled_bodies():
            continue
        body = twin_of(bodies()[key])
        with donating([]):
            compiled: Any = compile_fx_inner(
                body,
                inputs_of(body),
                static_input_idxs=[],
                cudagraphs=BoxedBool(False),
                graph_id=None,
                is_inference=False,
                is_backward=False,
            )
        compiled_bodies()[key] = compiled


def count_scratch(gm: fx.GraphModule) -> None:
    """Note on each tiled region of a graph what it takes for itself, as Inductor would emit its bodies."""
    held: dict[str, int] = {}
    for node in gm.graph.nodes:
        program = program_in(node)
        if program is not None:
            held.update({key: _held(key) for key in program.kinds if key not in held})
            node.meta[WORKSPACE] = _accumulators(node, program) + max(held[key] for key in program.kinds)


def _accumulators(node: fx.Node, program: Program) -> int:
    return accumulator_bytes(program, [n.meta["val"] for n in places_of(node)])


def _held(key: str) -> int:
    """Bytes that a body holds at most beside what it is given."""
    with donating([]):
        body = dry_run(bodies()[key], is_backward=False, scalar=True)
    ranges = [(s.start, s.end, s.bytes) for s in body.storages.values() if s.kind != Kind.INPUT]
    return max(live_bytes(ranges, body.steps), default=0)


def _bodies_in(gm: fx.GraphModule) -> dict[str, None]:
    return dict.fromkeys(key for p in programs_of(gm).values() for key in p.bodies)
