"""What a pass found, as plain data for JSON: nodes by their names, graphs left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch.fx as fx


def plain(found: Any) -> Any:
    """Dataclasses and mappings become dicts, sequences lists, sets sorted lists, nodes names, anything else text."""
    if found is None or isinstance(found, (bool, int, float, str)):
        return found
    if isinstance(found, fx.Node):
        return found.name
    if isinstance(found, fx.GraphModule):
        return None
    if is_dataclass(found):
        return {f.name: plain(getattr(found, f.name)) for f in fields(found)}
    if isinstance(found, Mapping):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, (set, frozenset)):
        return sorted(plain(value) for value in found)
    return [plain(value) for value in found] if isinstance(found, (list, tuple)) else str(found)
