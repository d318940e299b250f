"""Models that a user names as package.module:function, built from fake tensors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from memo_compile.errors import InvalidOption

CONTRACT = "package.module:function, without arguments, that returns (model, args) or (model, args, kwargs)"


def fake_target(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Model, args and kwargs of the function of that name, called in a mode in which tensors have no data.

    Raises:
        InvalidOption: there is none, it fails, or it returns something else.
    """
    from torch._subclasses import FakeTensorMode

    module, _, function = name.partition(":")
    if not module or not function:
        raise InvalidOption("target", name, CONTRACT)
    sys.path.insert(0, os.getcwd())  # as with python -m, modules of the current folder can be imported
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InvalidOption("target", name, f"{CONTRACT} ({error})") from error
    finally:
        sys.path.remove(os.getcwd())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = make()
    except Exception as error:  # the user's code may fail in any way
        raise InvalidOption("target", name, f"a function that works: {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or not 2 <= len(made) <= 4 or not callable(made[0]):
        raise InvalidOption("target", name, f"{CONTRACT}; this one returned {type(made).__name__}")
    model, args, *rest = made
    kwargs = rest[0] if rest else {}
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise InvalidOption("target", name, f"{CONTRACT}; args a tuple, kwargs a dict")
    return model, tuple(args), dict(kwargs)
