"""What an entry of the cache is kept under, beside what torch puts into its own key.

Torch's key holds the graph, its inputs, the settings of torch and of Inductor, and the versions. What else decides
which plan is made is put together here.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch

import memo_compile
from memo_compile.passes.fx.sizes import is_symbolic, sizes_of
from memo_compile.trace.ranks import may_plan_together
from memo_compile.trace.setting import Setting
from memo_compile.workspaces.seen import seen

FIRST = (2, 13)  # of torch, whose bundled entries hold any code that Inductor's caller makes
# What torch's key has already, what the key below has resolved, and what changes no plan.
_LEFT_OUT = ("inductor", "mode", "hardware", "host_budget", "cache", "dump")


def key_for(setting: Setting, gm: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """The digest under which a graph's plan and code are kept; None where nothing is to be read or kept.

    Not where the user has turned a cache off; not with a dump, which is of a compilation; not for ranges of lengths,
    whose bounds torch's entries do not hold; and not where ranks plan a graph together, since one that finds an entry
    would leave the others waiting.
    """
    if not setting.options.cache or setting.options.dump is not None or not _torch_caches():
        return None
    together = may_plan_together(gm, inputs) or setting.options.sequence_parallel is not None
    if any(is_symbolic(size) for size in sizes_of(inputs)) or together:
        return None
    return digest_of(setting)


def digest_of(setting: Setting) -> str:
    """Of all that decides a plan and is not of the graph."""
    facts = {
        "memo": source_digest(),
        "options": {k: v for k, v in asdict(setting.options).items() if k not in _LEFT_OUT},
        "given": asdict(setting.given) if setting.given is not None else None,
        "calls": setting.calls,
        "host": setting.host if setting.asks and setting.options.offload else 0,
        "profile": asdict(setting.profile),
        "device": str(setting.device),
        # What kernels take for themselves goes by threads.
        "processor": (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()),
        "seen": sorted((repr(key), size) for key, size in seen().bytes.items()),
    }
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def source_digest() -> str:
    """Of the package's own text: a version that is being worked on meets no entry of what it was before."""
    folder = Path(memo_compile.__file__).parent
    digest = sha256(memo_compile.__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _torch_caches() -> bool:
    """Whether torch is one whose entries can hold a plan, and its user wants what it compiles to be kept."""
    return torch_is_known() and torch_keeps()


def torch_is_known() -> bool:
    """Whether torch is one whose cache memo knows."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= FIRST


def torch_keeps() -> bool:
    """Whether torch's user wants what torch compiles to be kept.

    Private torch APIs, tried with torch 2.13: the settings of AOTAutograd's and of Inductor's cache.
    """
    from torch._inductor import config as inductor  # loads Inductor

    compiler: Any = torch.compiler.config
    return bool(functorch.enable_autograd_cache and inductor.fx_graph_cache) and not compiler.force_disable_caches
