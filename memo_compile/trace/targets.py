"""Models that a user names as package.module:function, built from fake tensors.

Private torch API, tried with torch 2.11 to 2.15: the memo of `FakeTensorMode.fake_tensor_converter`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memo_compile.errors import InvalidTarget

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode

Parts = tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]


def load_target(target: str) -> Callable[[], Any]:
    """The function that `package.module:function` names.

    Raises:
        InvalidTarget: there is none.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise InvalidTarget(target, "it does not name a module and a function")
    try:
        with _importing_from_here():
            found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidTarget(target, str(error)) from error
    if not callable(found):
        raise InvalidTarget(target, f"it is a {type(found).__name__}, which cannot be called")
    return found


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """As with `python -m`, modules of the current folder can be imported."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def made_of_fakes(target: str, make: Callable[[], Any], mode: FakeTensorMode) -> Parts:
    """Model, args, kwargs and options as `make()` returns them, called in a mode in which tensors have no data.

    Raises:
        InvalidTarget: `make`, which goes by the name of `target`, fails or returns something else.
    """
    with mode, _convertible(mode):
        return _parts(target, make)


@contextlib.contextmanager
def _convertible(mode: FakeTensorMode) -> Iterator[None]:
    """Within, `model.to(dtype)` works: it swaps parameters, which torch refuses where a weak reference to them is kept.

    The memo of the mode's converter, which keeps one, is for converting real tensors.
    """
    converter: Any = mode.fake_tensor_converter
    converter.set_tensor_memo = lambda real, fake: None
    try:
        yield
    finally:
        del converter.set_tensor_memo


def _parts(target: str, make: Callable[[], Any]) -> Parts:
    try:
        made = make()
    except Exception as error:
        raise InvalidTarget(target, f"it raised {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or not 2 <= len(made) <= 4 or not callable(made[0]):
        raise InvalidTarget(target, f"it returned {type(made).__name__}")
    model, args, *rest = made
    kwargs, options = (*rest, {}, {})[:2]
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping) or not isinstance(options, Mapping):
        raise InvalidTarget(target, "args must be a tuple, kwargs and options dicts")
    return model, tuple(args), dict(kwargs), dict(options)
