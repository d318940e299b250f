"""What Inductor is given in place of its own code and partitioner, so that torch's cache can hold a plan.

AOTAutograd's cache, in its bundled mode, pickles the compiled forward and backward, and calls their `post_compile` when
it loads them: they then ask the compilation that is under way, through its partitioner, to put around the code what
stood around it when it was compiled.

Private torch APIs, tried with torch 2.13: `OutputCode`, and that `torch._inductor.config.custom_partitioner_fn`
is set while an entry is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.output_code import OutputCode

from memo_compile.codegen.caching.tiles import Tiles, load, without_callables, written_out
from memo_compile.runtime.calls import Boxed
from memo_compile.runtime.cross_call import Schedule
from memo_compile.runtime.outstanding import Kept
from memo_compile.schema import Plan
from memo_compile.trace.setting import Told

Partition = Callable[[fx.GraphModule, Any, int, "list[int] | None"], tuple[fx.GraphModule, fx.GraphModule]]


@dataclass(frozen=True)
class ForwardFacts:
    """What is to be known of a compiled forward: what a call keeps, and which output is the host lease."""

    digest: str
    kept: Kept | None
    lease_at: int | None


@dataclass(frozen=True)
class BackwardFacts:
    """What is to be known of a compiled backward.

    `lease_at` is the input that is the host lease, `donated` are inputs that the code writes over, `schedule` says what
    a call before may start, `plan` is carried out, and `told` is what the user is told of it.
    """

    digest: str
    lease_at: int | None
    donated: tuple[int, ...]
    schedule: Schedule | None
    plan: Plan
    told: Told


Facts = ForwardFacts | BackwardFacts


class Partitioner(CustomPartitionerFn):
    """Leads from Inductor to a compilation. Picklable by its digest alone, since it stands in torch's key."""

    def __init__(self, digest: str, partition: Partition | None = None, loaded: Any = None) -> None:
        self.digest, self._partition, self.loaded = digest, partition, loaded

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        """A joint graph's forward and backward."""
        assert self._partition is not None
        static = kwargs.get("static_lifetime_input_indices")
        return self._partition(gm, joint_inputs, kwargs["num_fwd_outputs"], static)

    def uuid(self) -> str:
        """Enters torch's key."""
        return self.digest

    def __reduce__(self) -> Any:
        return Partitioner, (self.digest,)


def not_loaded(inputs: list[Any]) -> Any:
    """What an entry that is not loaded runs.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("an entry of the cache was called before torch had loaded it")


@dataclass
class PlannedCode(OutputCode):
    """Inductor's code of one graph, with what stands around it in `run`. `key` is what torch keeps the entry under."""

    code: Any
    tiles: Tiles
    facts: Facts
    run: Boxed
    key: str = ""
    _boxed_call: bool = True

    def __call__(self, inputs: Any) -> Any:
        """Run it."""
        return self.run(inputs)

    def prepare_for_serialization(self) -> None:
        """Called on a copy, which is then pickled."""
        self.code = copy.copy(self.code)
        self.code.prepare_for_serialization()
        self.tiles = without_callables(self.tiles)
        self.run = not_loaded

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """Called when an entry is loaded, and then only.

        Raises:
            RuntimeError: the entry is of other options, or its code is gone; torch compiles anew.
        """
        partitioner: Any = config.custom_partitioner_fn
        if self.facts.digest != getattr(partitioner, "digest", None):
            raise RuntimeError("an entry of other options")
        load(self.tiles)
        code = written_out(self.code, constants)
        code.post_compile(example_inputs, constants, graph_kwargs)
        self.run = partitioner.loaded(code, self.facts)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Inductor's code has its own."""
