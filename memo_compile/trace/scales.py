"""Attention's `scale`, where a length that varies is in it: it goes into the queries.

The op takes a number, no symbol: Dynamo would make a number of the length, for any backend, and compile anew for each.

Private torch APIs, tried with torch 2.13: the table of functions that Dynamo handles in ways of their own
(`TorchInGraphFunctionVariable._get_handlers`), `SymNodeVariable`, `inline_user_function_return`. Where one is missing,
or torch has a way of its own for attention by now, that is left alone: each scale is compiled alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from memo_compile.logs import logger

log = logger("memo_compile")

Wants = Callable[[Any], bool]


def keep_symbolic(wants: Wants) -> None:
    """From now on such a scale goes into the queries where `wants` says so of the backend that Dynamo compiles for."""
    try:
        handlers, handler = _handlers(), _handler(wants)
    except (ImportError, AttributeError) as missing:
        log.info("attention's scale is a number: %s", missing)
        return
    handlers.setdefault(scaled_dot_product_attention, handler)


def _handlers() -> dict[Any, Any]:
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable  # loads Dynamo

    found: dict[Any, Any] = TorchInGraphFunctionVariable._get_handlers()
    return found


def _handler(wants: Wants) -> Callable[..., Any]:
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase  # loads Dynamo
    from torch._dynamo.variables.functions import UserFunctionVariable
    from torch._dynamo.variables.tensor import SymNodeVariable

    _ = InstructionTranslatorBase.inline_user_function_return  # or say at once that there is none

    def handle(_: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("scale"), SymNodeVariable) or not wants(tx.output.compiler_fn):
            return None  # as Dynamo would
        scaled: Any = _with_scaled_queries
        return tx.inline_user_function_return(UserFunctionVariable(scaled), args, kwargs)

    return handle


def _with_scaled_queries(query: torch.Tensor, *others: Any, scale: float, **kwargs: Any) -> torch.Tensor:
    """Attention whose own scale, the root of the width, is the only one left to it."""
    query = query * (scale * math.sqrt(query.shape[-1]))
    return scaled_dot_product_attention(query, *others, **kwargs)
