"""Plans that are kept by themselves: for graphs whose code torch's cache does not take, or has lost.

An entry holds the homes, and what dry runs showed of the graphs that carry them out. So a hit makes these graphs again,
and asks neither the linear program nor a dry run. What is emitted is compared with what is kept, as it is with what a
dry run showed now: no entry can make code wrong.

The folder stands beside torch's entries: `CACHE/memo_plans/KEY`, a file's first bytes being the hash of the others.

Private torch APIs, tried with torch 2.13: `torch._inductor.runtime.cache_dir_utils.cache_dir`.
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


def find(key: str) -> KeptPlan | None:
    """The plan that is kept under a key; None where there is none that is whole."""
    path = plans_folder() / key
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a pickle raises that is torn, or another version's
        log.info("a kept plan is left out, and made anew: %s: %s: %s", path, type(error).__name__, error)
        return None


def read(path: Path) -> KeptPlan:
    """The plan in a file.

    Raises:
        ValueError: its bytes are not those that were written, or were written under another name.
    """
    content = path.read_bytes()
    digest, pickled = content[:DIGEST], content[DIGEST:]
    if sha256(pickled).hexdigest().encode() != digest:
        raise ValueError("its bytes are not those that were written")
    kept = pickle.loads(pickled)
    if not isinstance(kept, KeptPlan) or kept.key != path.name:
        raise ValueError("it was written under another key")
    return kept


def keep(kept: KeptPlan) -> None:
    """Write a plan: whole or not at all, whoever else writes at the same time."""
    pickled = pickle.dumps(kept)
    folder = plans_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(sha256(pickled).hexdigest().encode() + pickled)
        Path(name).replace(folder / kept.key)
    except OSError as error:
        log.info("a plan is not kept: %s", error)


def kept_files() -> Iterator[Path]:
    """The files of all plans that are kept."""
    with contextlib.suppress(OSError):
        yield from sorted(f for f in plans_folder().iterdir() if f.is_file() and not f.name.startswith("."))
