"""One class for each thing that a user can get wrong.

Every message names what was asked, what is possible, and what to change.
"""

from __future__ import annotations


class MemoError(RuntimeError):
    """Base of every error that memo raises on purpose."""
