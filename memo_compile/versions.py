"""Which versions of torch memo knows.

Every module that uses a private API of torch says in its docstring, or that of the function, on which versions it was
tried. `make test-compat` runs the compiling path on the oldest and the newest; the tests run on the one between.
"""

from __future__ import annotations

import torch

from memo_compile.errors import UnsupportedTorch

OLDEST, NEWEST = (2, 11), (2, 15)


def check_torch(version: str = torch.__version__) -> None:
    """Refuse a torch that memo was not tried on.

    Raises:
        UnsupportedTorch: the version is outside the supported range.
    """
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        known = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        raise UnsupportedTorch(f"memo works with torch {known}; this is {version}. Install one of those.")
