"""Emitted lines as Python statements. The verifier parses for itself: it shares nothing with what it checks."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence
from enum import StrEnum

NAMESPACE = "torch.ops.memo."
PREFETCH_BUFFER = f"{NAMESPACE}prefetch_buffer.default"
PREFETCH = f"{NAMESPACE}prefetch_.default"
WAIT = f"{NAMESPACE}wait_.default"


class TransferOp(StrEnum):
    """memo's ops that start a copy or wait for one, by their names."""

    OFFLOAD = "offload"
    OFFLOAD_WAIT = "offload_wait"
    PREFETCH = "prefetch_"
    WAIT = "wait_"


def transfer_op(name: str) -> TransferOp | None:
    """The transfer that an op of memo's is.

    >>> transfer_op("wait_"), transfer_op("mm_into_")
    (<TransferOp.WAIT: 'wait_'>, None)
    """
    return _TRANSFERS.get(name)


_TRANSFERS = {op.value: op for op in TransferOp}


def source_of(lines: Sequence[str]) -> str:
    """Lines as one text without comments; each line keeps its number."""
    return textwrap.dedent("\n".join("" if line.lstrip().startswith("#") else line for line in lines))


def statements_of(lines: Sequence[str]) -> list[ast.stmt]:
    """The statements of emitted lines in order.

    Raises:
        SyntaxError: a line is no whole statement, such as the head of a block.

    >>> [ast.unparse(s) for s in statements_of(["# a comment", "    with guard:", "        a = f()", "    del a"])]
    ['a = f()', 'del a']
    """
    return flatten(ast.parse(source_of(lines)).body)


def flatten(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Statements in order; the bodies of `with` blocks stand in line."""
    flat: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.With):
            flat.extend(flatten(statement.body))
        else:
            flat.append(statement)
    return flat


def function_in(text: str, name: str) -> tuple[list[str], list[str]]:
    """The statements of a function before its `return`, and the expressions that it returns.

    Raises:
        LookupError: there is no such function, or it does not end so.

    >>> function_in("def f(args):\\n    a, b = args\\n    return (a, g(b), )", "f")
    (['a, b = args'], ['a', 'g(b)'])
    """
    found = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not found or not isinstance(found[0].body[-1], ast.Return):
        raise LookupError(name)
    *statements, last = found[0].body
    value = last.value if isinstance(last, ast.Return) else None
    returned = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value] if value is not None else []
    return [ast.unparse(s) for s in statements], [ast.unparse(r) for r in returned]


def call_in(statement: ast.stmt) -> ast.Call | None:
    """The call that a statement makes, where that is all it does."""
    value = statement.value if isinstance(statement, (ast.Expr, ast.Assign)) else None
    return value if isinstance(value, ast.Call) else None


def memo_op(call: ast.Call) -> str:
    """The op of memo's own that a call is; "" for any other.

    >>> memo_op(ast.parse("torch.ops.memo.wait_.default(a, 0)").body[0].value)
    'wait_'
    """
    function = ast.unparse(call.func)
    return function.removeprefix(NAMESPACE).removesuffix(".default") if function.startswith(NAMESPACE) else ""
