"""Bytes and source lines for people."""

from __future__ import annotations

import os
import re


def human(size: float) -> str:
    """Bytes with a unit.

    >>> human(1536), human(3 * 2**30), human(12)
    ('1.5 KiB', '3.0 GiB', '12 B')
    """
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(size) >= 2**power:
            return f"{size / 2**power:,.1f} {unit}"
    return f"{size:.0f} B"


def short(source: str) -> str:
    """A source line whose path begins at the package, or at the working directory.

    >>> short("/usr/lib/python3/site-packages/transformers/loss.py:4: x = y")
    'transformers/loss.py:4: x = y'
    """
    inside = re.sub(r"^.*?/(?:site|dist)-packages/", "", source)
    return inside.removeprefix(os.getcwd() + "/")
