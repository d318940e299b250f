"""Which inputs a joint graph writes to, and what AOTAutograd says of its outputs.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `output.meta["desc"]` and its `InputMutationAOTOutput`.
"""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from memo_compile.passes.fx.facts import writes_in_place


def readable_inputs(joint: fx.GraphModule) -> set[fx.Node]:
    """The inputs that hold in the backward what they held in the forward: no tangents, nothing that is mutated."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    described = {d.mutated_input for d in _output_descriptors(joint) if hasattr(d, "mutated_input")}
    mutated = {n for n in placeholders if n.meta.get("desc") in described}
    for node in joint.graph.nodes:
        if node.op == "call_function" and writes_in_place(node):
            mutated.update(a for a in node.all_input_nodes[:1] if a.op == "placeholder")
    return {n for n in placeholders if "tangents" not in str(n.target)} - mutated


def num_mutated_outputs(gm: fx.GraphModule) -> int:
    """How many leading outputs are not the user's, but new values of inputs that AOTAutograd copies back."""
    return sum(1 for d in _output_descriptors(gm) if hasattr(d, "mutated_input"))


def _output_descriptors(gm: fx.GraphModule) -> list[Any]:
    """AOTAutograd's description of each output."""
    (output,) = gm.graph.find_nodes(op="output")
    return [d for d in output.meta.get("desc", ()) if d is not None]
