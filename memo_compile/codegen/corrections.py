"""What Inductor gets wrong, and memo puts right while it compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from memo_compile.codegen.branches import branches_given_as_traced
from memo_compile.codegen.mutations import in_place_where_known, readers_before_writers


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """Within, all of it is right."""
    with readers_before_writers(), in_place_where_known(), branches_given_as_traced():
        yield
