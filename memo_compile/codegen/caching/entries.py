"""The entries of torch's cache that hold plans: found, checked, deleted, and none used that is not whole.

Torch writes an entry to `CACHE/aotautograd/KEY/HASH`, where HASH is of its bytes, and never looks at the hash again.

Private torch APIs, tried with torch 2.13: `AOTAutogradCache._lookup`, `save` and `_get_tmp_dir`, and `sha256_hash`.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memo_compile.codegen.caching import plans
from memo_compile.logs import logger
from memo_compile.schema import Plan

log = logger("memo_compile")

MARK = b"memo_compile.codegen.caching.code"  # how a pickle names the class of planned code


@dataclass(frozen=True)
class Entry:
    """A file with a plan; `fault` says why it is of no use, "" where it is whole."""

    path: Path
    size: int
    written: float  # seconds since 1970
    plan: Plan | None = None
    fault: str = ""

    @property
    def key(self) -> str:
        """What it is kept under."""
        return self.path.name if self.path.parent == plans.plans_folder() else self.path.parent.name


def entries() -> Iterator[Entry]:
    """All entries that hold plans, whole or not, oldest first: torch's with their code, then those by themselves."""
    files = (f for f in plans.torchs_folder().glob("*/*") if f.is_file() and not f.name.startswith("."))
    for path in sorted(files, key=_written):
        with contextlib.suppress(OSError):  # another process may delete it
            content = path.read_bytes()
            if MARK in content:
                yield _read(path, len(content), partial(_plan_of, path.parent.name, path.name, content))
            elif plans.MARK in content:  # loaded with torch's artifacts, and not looked for yet
                yield _read(path, len(content), partial(_loaded_alone, path.parent.name, content))
    for path in sorted(plans.kept_files(), key=_written):
        with contextlib.suppress(OSError):
            yield _read(path, path.stat().st_size, partial(_kept_alone, path))


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path, size: int, plan: Callable[[], Plan]) -> Entry:
    try:
        return Entry(path, size, _written(path), plan=plan())
    except Exception as error:  # whatever a torn pickle raises
        return Entry(path, size, _written(path), fault=f"{type(error).__name__}: {error}")


def _kept_alone(path: Path) -> Plan:
    return plans.read(path).plan


def _loaded_alone(key: str, content: bytes) -> Plan:
    return plans.unpacked(content, key).plan


def _plan_of(key: str, name: str, content: bytes) -> Plan:
    """The plan of an entry's bytes.

    Raises:
        ValueError: they are not what was written, or were written under another key.
    """
    from torch._inductor.codecache import sha256_hash  # loads Inductor

    if sha256_hash(content) != name:
        raise ValueError("its bytes are not those that were written")
    entry: Any = pickle.loads(content)
    front, back = entry.compiled_fw.result, entry.compiled_bw.result
    if {front.key, back.key} != {key}:
        raise ValueError("it was written under another key")
    plan: Plan = back.facts.plan
    return plan


def delete(path: Path) -> None:
    """Delete an entry, and its folder with the last one."""
    with contextlib.suppress(OSError):
        path.unlink()
        path.parent.rmdir()


@contextlib.contextmanager
def only_whole_entries() -> Iterator[None]:
    """Within, torch writes into each planned entry what it is kept under, and finds none that is torn or not there."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache  # a private part of torch

    caches: Any = AOTAutogradCache
    lookup, save = caches.__dict__["_lookup"], caches.__dict__["save"]

    def found(key: str, *args: Any, **keywords: Any) -> Any:
        _drop_faulty(key)
        return lookup.__func__(key, *args, **keywords)

    def kept(key: str, entry: Any, *args: Any, **keywords: Any) -> Any:
        _name(entry, key)
        return save.__func__(key, entry, *args, **keywords)

    caches._lookup, caches.save = staticmethod(found), staticmethod(kept)
    try:
        yield
    finally:
        caches._lookup, caches.save = lookup, save


def _name(entry: Any, key: str) -> None:
    for part in (entry.compiled_fw, entry.compiled_bw):
        code: Any = getattr(part, "result", None)
        if hasattr(code, "facts"):
            code.key = key


def _drop_faulty(key: str) -> None:
    for path in sorted((plans.torchs_folder() / key).glob("[!.]*")):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if fault := _fault(key, path.name, content):
            log.info("an entry of the cache is left out, and made anew: %s: %s", path, fault)
            delete(path)


def _fault(key: str, name: str, content: bytes) -> str:
    """Why bytes under a key are of no use; "" where they are."""
    from torch._inductor.codecache import sha256_hash  # loads Inductor

    if sha256_hash(content) != name:
        return "its bytes are not those that were written"
    return "" if key.encode() in content or MARK not in content else "it was written under another key"
