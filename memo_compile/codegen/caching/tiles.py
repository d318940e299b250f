"""What the tiled calls of a graph run, kept with the graph's code: their programs, and the code of the bodies.

Emitted code knows a program by its key alone, and programs and bodies are a process's own.

Private torch APIs, tried with torch 2.13: `FxGraphCache.cache_hit_post_compile`, and `CompiledFxGraph`, which is what
`compile_fx_inner` returns: its `prepare_for_serialization` and `post_compile`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.fx as fx

from memo_compile.passes.transforms.tile_bodies import Program, programs
from memo_compile.passes.transforms.tiles import programs_of
from memo_compile.runtime.tiles import compiled_bodies


@dataclass(frozen=True)
class Tiles:
    """Programs and compiled bodies by their keys, in the order in which they were compiled."""

    programs: Mapping[str, Program] = field(default_factory=dict)
    bodies: Mapping[str, Any] = field(default_factory=dict)


def tiles_of(gm: fx.GraphModule) -> Tiles:
    """What the calls of a graph run, whose bodies this process has compiled."""
    called = programs_of(gm)
    bodies = {key: compiled_bodies()[key] for program in called.values() for key in program.bodies}
    return Tiles(called, bodies)


def without_callables(tiles: Tiles) -> Tiles:
    """The same, as it can be pickled."""
    bodies = {key: copy.copy(code) for key, code in tiles.bodies.items()}
    for code in bodies.values():
        code.prepare_for_serialization()
    return replace(tiles, bodies=bodies)


def load(tiles: Tiles) -> None:
    """Make what was pickled known to this process, as far as it has not made it itself.

    Raises:
        RuntimeError: as `written_out` does.
    """
    from torch._inductor.output_code import CompiledFxGraphConstants  # loads Inductor
    from torch._inductor.utils import BoxedBool

    constants = CompiledFxGraphConstants()
    for key, kept in tiles.bodies.items():
        if key not in compiled_bodies():
            code = written_out(kept, constants)
            code.post_compile([], constants, {"cudagraphs": BoxedBool(False), "is_backward": False})
            compiled_bodies()[key] = code
    for key, program in tiles.programs.items():
        programs().setdefault(key, program)


def written_out(code: Any, constants: Any) -> Any:
    """Inductor's code of an entry, written to where it is run from.

    Raises:
        RuntimeError: it cannot be; torch compiles anew.
    """
    from torch._inductor.codecache import FxGraphCache  # loads Inductor

    written, _ = FxGraphCache.cache_hit_post_compile(code, {}, constants)
    if written is None:
        raise RuntimeError("the code of an entry cannot be written to its place")
    return written
