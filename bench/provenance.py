"""Where a figure comes from: the card, the versions, the commit, and the code that it depends on.

A row is older than the code when what it depends on has changed: memo's rows hang on the whole package, those of a peer
on the model's file and on the peer's own. Files are named by the hashes that git gives them, computed from what lies
there, so that a copy without history knows as much as a clone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.common import ROOT

_LEFT_OUT = ("__pycache__", ".pyc", ".so", ".egg-info")


def git_hash(path: Path) -> str:
    """What git calls a file or a folder with all that lies in it, tracked or not; compiled files are left out."""
    return _tree(path).hex() if path.is_dir() else _blob(path).hex()


def _blob(path: Path) -> bytes:
    return _object("blob", path.read_bytes())


def _tree(folder: Path) -> bytes:
    entries = []
    for path in folder.iterdir():
        if path.name.endswith(_LEFT_OUT) or (path.is_dir() and not any(_files(path))):
            continue
        mode = "40000" if path.is_dir() else "100755" if os.access(path, os.X_OK) else "100644"
        name = f"{mode} {path.name}".encode()
        content = name + b"\0" + (_tree(path) if path.is_dir() else _blob(path))
        entries.append((path.name + "/" * path.is_dir(), content))
    return _object("tree", b"".join(content for _, content in sorted(entries)))


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not any(part.endswith(_LEFT_OUT) for part in p.parts)]


def _object(kind: str, content: bytes) -> bytes:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()


@cache
def code_of(sources: tuple[str, ...], root: Path = ROOT) -> str:
    """Twelve digits that change whenever one of these files or folders of the checkout does."""
    hashes = "".join(git_hash(root / source) for source in sources)
    return hashlib.sha1(hashes.encode()).hexdigest()[:12]


@cache
def commit() -> str:
    """The commit that lies here, with a + where files differ from it; MEMO_COMMIT says it where there is no git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--", "memo_compile", "bench/*.py"))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MEMO_COMMIT", "")


def _git(*arguments: str) -> str:
    return _said("git", "-C", str(ROOT), *arguments)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@cache
def card(device: str) -> str:
    """The name of the device that figures are of, asked for without taking any of its memory."""
    if device != "cuda":
        return platform.processor() or platform.machine()
    try:
        return _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return torch.cuda.get_device_name()


def versions() -> dict[str, str]:
    """What a figure hangs on besides the code."""
    names = ("triton", "transformers", "liger-kernel")
    return {"torch": torch.__version__, "python": platform.python_version(), **_installed(names)}


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def made(device: str) -> dict[str, Any]:
    """What every row says of where it comes from, but for its code."""
    return {"card": card(device), "commit": commit(), **versions()}
