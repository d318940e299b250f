"""Sequence parallelism as the user asks for it: which tokens of a joint graph are this rank's."""

from __future__ import annotations

import torch.distributed as dist
import torch.fx as fx

from memo_compile.errors import NotShareable
from memo_compile.models.collectives import process_group
from memo_compile.options import Options
from memo_compile.passes.analysis.tokens import annotate_tokens
from memo_compile.passes.fx.ranges import NoRange, has_symbols
from memo_compile.passes.transforms.sequence_shards import Part, share_tokens

TOKENS = 1  # the dimension of data inputs that counts tokens


def share_sequence(joint: fx.GraphModule, static_inputs: list[int] | None, part: Part | None) -> None:
    """Let a joint graph compute this rank's part of the tokens, where there is a part.

    Raises:
        NotShareable: the graph has no tokens, or an op reads all of them.
        NoRange: sizes are symbols; each length is shared out for itself.
    """
    if part is None:
        return
    if has_symbols(joint):
        raise NoRange("tokens are shared out for one length")
    static = set(static_inputs or ())
    placeholders = [n for n in joint.graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
    data = [n for i, n in enumerate(placeholders) if i not in static]
    if not annotate_tokens(joint, data, dims=(TOKENS,)).tokens:
        raise NotShareable("no input has tokens at dimension 1", "the inputs")
    share_tokens(joint, data, part)


def part_of(options: Options) -> Part | None:
    """The part that a user asked for: one of the ranks of a process group that is there."""
    group = options.sequence_parallel
    return None if group is None else Part(group, dist.get_world_size(process_group(group)))
