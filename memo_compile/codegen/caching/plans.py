"""Plans that are kept by themselves: for graphs whose code torch's cache does not take, or has lost.

An entry holds the homes, and what dry runs showed of the graphs that carry them out. So a hit makes these graphs again,
and asks neither the linear program nor a dry run. What is emitted is compared with what is kept, as it is with what a
dry run showed now: no entry can make code wrong.

The folder stands beside torch's entries: `CACHE/memo_plans/KEY`, a file's first bytes being the hash of the others.

`torch.compiler.save_cache_artifacts()` holds the plans that this process made or found. They go by the name of
AOTAutograd's entries: a kind of memo's own would spoil all for a process that loads them before it knows memo. So
`load_cache_artifacts()` writes them to AOTAutograd's folder, from where the first that looks for one takes it.

Private torch APIs, tried with torch 2.13: `torch._inductor.runtime.cache_dir_utils.cache_dir`;
`CacheArtifactManager.record_artifact`, and that an artifact of AOTAutograd's is written to `FOLDER/KEY/HASH`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from memo_compile.codegen.caching.key import torch_is_known
from memo_compile.codegen.rehearsal import Evidence
from memo_compile.logs import logger
from memo_compile.passes.transforms.residency import Residency
from memo_compile.planning.decide import Decided, carry_out, decided_unplanned
from memo_compile.planning.fit_budget import Fitted
from memo_compile.planning.prepared import Prepared
from memo_compile.planning.problem import Limits
from memo_compile.planning.tiling import with_tiles
from memo_compile.schema import Plan

log = logger("memo_compile")

DIGEST = 64  # hexadecimal digits
MARK = b"memo_compile.codegen.caching.plans"  # how a pickle names the class of kept plans


@dataclass(frozen=True)
class KeptPlan:
    """What was decided within `limits`, without the graphs; `split_as_torch` says that they are those of torch's split.

    `unplanned_peak` is what the unplanned graphs hold, in bytes; `key` is what the plan is kept under.
    """

    key: str
    limits: Limits
    unplanned_peak: int
    within: Limits
    plan: Plan
    residency: Mapping[str, Residency]
    overlap: bool
    split_as_torch: bool
    peak_tensors: tuple[str, ...]
    peak: int
    evidence: Evidence

    def fitted(self, p: Prepared, name: str) -> Fitted[Evidence]:
        """The plan carried out again, on the same joint graph."""
        plan = replace(self.plan, name=name)
        tiled = with_tiles(p, self.within)
        if self.split_as_torch:
            decided = decided_unplanned(tiled, self.within, plan)
        else:
            sliced = carry_out(tiled, self.residency, overlap=self.overlap, host_budget=self.within.host_in_all)
            decided = Decided(
                forward=sliced.forward,
                backward=sliced.backward,
                saved=sliced.saved,
                residency=self.residency,
                overlap=self.overlap,
                plan=plan,
                limits=self.within,
            )
        decided = replace(decided, peak_tensors=self.peak_tensors)
        return Fitted(decided, self.peak, self.evidence, self.plan.rounds)


def kept_plan(key: str, p: Prepared, limits: Limits, fitted: Fitted[Evidence]) -> KeptPlan:
    """What is to be kept of a plan."""
    decided = fitted.decided
    return KeptPlan(
        key=key,
        limits=limits,
        unplanned_peak=p.unplanned_peak,
        within=decided.limits,
        plan=replace(decided.plan, rounds=fitted.rounds),
        residency=dict(decided.residency),
        overlap=decided.overlap,
        split_as_torch=decided.forward is p.unplanned.forward,
        peak_tensors=decided.peak_tensors,
        peak=fitted.peak,
        evidence=replace(fitted.evidence, lowered=(None, None)),
    )


def plans_folder() -> Path:
    """Where plans are kept."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # a private part of torch

    return Path(cache_dir()) / "memo_plans"


def torchs_folder() -> Path:
    """Where torch keeps what AOTAutograd compiled."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache  # a private part of torch

    caches: Any = AOTAutogradCache
    return Path(caches._get_tmp_dir())


def find(key: str) -> KeptPlan | None:
    """The plan that is kept under a key; None where there is none that is whole."""
    path = plans_folder() / key
    _take_over(path)
    try:
        found = read(path)
        _hand_on(path)
        return found
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a pickle raises that is torn, or another version's
        log.info("a kept plan is left out, and made anew: %s: %s: %s", path, type(error).__name__, error)
        return None


def read(path: Path) -> KeptPlan:
    """The plan in a file.

    Raises:
        ValueError: as `unpacked` does.
    """
    return unpacked(path.read_bytes(), path.name)


def unpacked(content: bytes, key: str) -> KeptPlan:
    """The plan in the bytes of a file.

    Raises:
        ValueError: these are not what was written, or were written under another key.
    """
    digest, pickled = content[:DIGEST], content[DIGEST:]
    if sha256(pickled).hexdigest().encode() != digest:
        raise ValueError("its bytes are not those that were written")
    kept = pickle.loads(pickled)
    if not isinstance(kept, KeptPlan) or kept.key != key:
        raise ValueError("it was written under another key")
    return kept


def keep(kept: KeptPlan) -> None:
    """Write a plan: whole or not at all, whoever else writes at the same time."""
    pickled = pickle.dumps(kept)
    path = plans_folder() / kept.key
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(sha256(pickled).hexdigest().encode() + pickled)
        Path(name).replace(path)
        _hand_on(path)
    except OSError as error:
        log.info("a plan is not kept: %s", error)


def _hand_on(path: Path) -> None:
    """Torch's artifacts hold the plan from now on."""
    if not torch_is_known():
        return
    from torch.compiler._cache import CacheArtifactManager  # a private part of torch

    manager: Any = CacheArtifactManager
    manager.record_artifact("aot_autograd", path.name, path.read_bytes())


def _take_over(path: Path) -> None:
    """A plan that torch has loaded with its artifacts is put in its place, unless there is one."""
    if not torch_is_known():
        return
    with contextlib.suppress(OSError):
        for loaded in sorted((torchs_folder() / path.name).glob("[!.]*")):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                loaded.unlink()
            else:
                loaded.replace(path)
        (torchs_folder() / path.name).rmdir()


def kept_files() -> Iterator[Path]:
    """The files of all plans that are kept."""
    with contextlib.suppress(OSError):
        yield from sorted(f for f in plans_folder().iterdir() if f.is_file() and not f.name.startswith("."))
