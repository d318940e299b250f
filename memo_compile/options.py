"""`Options`: what a user may ask of memo. Parsed and checked at once, before anything is traced.

Every option can be overridden from the environment, `MEMO_` and its name in capitals: `MEMO_DUMP=DIR`,
`MEMO_MEMORY_BUDGET=48GiB`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any, Literal, get_args

from memo_compile.errors import InvalidOption, UnknownOption
from memo_compile.hardware.profiles import resolve

_UNITS = {"": 1, "b": 1}
for _i, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_i
    _UNITS[f"{_letter}b"] = 1000**_i
MOST = 2**62  # bytes
_RATIO = re.compile(r"\s*\d*\.\d+\s*")
# More digits are no size that there is, and Python converts only so many.
_SIZE = re.compile(r"^\s*(?P<number>\d{1,30}(?:\.\d+)?)\s*(?P<unit>[a-zA-Z]*)\s*$")


@dataclass(frozen=True)
class Options:
    """The options of `torch.compile(model, backend="memo", options={...})`.

    Attributes:
        memory_budget: device bytes that the compiled forward and backward may hold: a number of bytes, a string with a
            unit ("48GiB"), a ratio in (0, 1] of the unplanned peak (a float), "min" or "auto".
        reserve: bytes that "auto" leaves for what does not exist yet; None: 8 for each trainable element, and an
            engine's buffers.
        host_budget: bytes of host memory for offloaded slices, or "auto": half of what is free.
        offload: whether activations may go to the host; "all": all that can move does, and nothing is recomputed, which
            is what blocks that are compiled alone want, since what each call keeps is held for all of them.
        recompute: whether activations may be recomputed beyond what Inductor itself would.
        token_slice: rows of a slice, or "auto": a 64th of the tokens.
        tiles: in how many tiles regions around the widest values run, the loss over a large vocabulary above all;
            1: in none; "auto": in as few as the budget needs.
        accumulate: the dtype in which tiles add up gradients of weights in bfloat16 or float16: "float32", or "same",
            which holds half as much and rounds the sum at each tile.
        solver_time_limit: seconds of processor time that one linear or integer program may take.
        hardware: "auto", the name of a built-in profile, or the path of a profile's JSON file.
        dump: a folder for graphs, plan and arena; None: no dump.
        verify: check placements at compile time, and compare the first step with the unplanned graph; "poison": fill
            bytes that nobody may read, or not yet, with NaN.
        inductor: config patches that are passed on to Inductor.
        mode: Inductor's mode (`torch.compile(mode=...)`).
        lengths: what to do where Dynamo finds a size that varies: "range" plans once for a range of it, "exact" each
            for itself, and a list of buckets is of the lengths to plan for (see `memo_compile.data`).
        calls: how many calls of one graph wait for their backward at once (blocks that are compiled alone, microbatches
            of a pipeline). Budgets are for all of them. "auto": as many as there are modules like the compiled one; a
            step that makes more is planned again.
        cache: whether plan and code are kept for the next process.
        sequence_parallel: the name of a process group whose ranks share the tokens out, which
            `memo_compile.sequence_parallel` writes.
    """

    memory_budget: int | float | str = "auto"
    reserve: int | None = None
    host_budget: int | str = "auto"
    offload: bool | Literal["all"] = True
    recompute: bool = True
    token_slice: int | str = "auto"
    tiles: int | Literal["auto"] = "auto"
    accumulate: Literal["float32", "same"] = "float32"
    solver_time_limit: float = 10.0
    hardware: str = "auto"
    dump: str | None = None
    verify: bool | Literal["poison"] = False
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    lengths: str | tuple[int, ...] = "range"
    calls: int | str = "auto"
    cache: bool = True
    sequence_parallel: str | None = None

    @staticmethod
    def parse(
        raw: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None, *, mode: str | None = None
    ) -> Options:
        """Read a user's options and the `mode` beside them; what the environment says wins.

        Raises:
            UnknownOption: a key that memo does not know.
            InvalidOption: a value of the wrong type, or one that cannot be.

        >>> Options.parse({"memory_budget": "2KiB"}, {}).memory_budget
        2048
        """
        if raw is not None and not isinstance(raw, Mapping):
            raise InvalidOption("options", raw, 'a dict of options, such as {"memory_budget": "48GiB"}')
        values = {
            **(raw or {}),
            **({} if mode is None else {"mode": mode}),
            **_from_environment(os.environ if environment is None else environment),
        }
        for key in values:
            if key not in _CHECKS:
                raise UnknownOption(key, list(_CHECKS))
        checked: dict[str, Any] = {key: _CHECKS[key](key, value) for key, value in values.items()}
        return replace(Options(), **checked)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in fields(Options):
        text = environment.get(f"MEMO_{option.name.upper()}")
        if text is not None and option.name == "inductor":
            raise InvalidOption(
                "MEMO_INDUCTOR", text, "nothing: config patches have no form as text; set them in options"
            )
        if text is not None:
            found[option.name] = _typed(option.name, text)
    return found


def _typed(key: str, text: str) -> Any:
    """An environment's text as the type that the option has."""
    if key in {"dump", "hardware", "mode", "sequence_parallel"}:
        return text
    if key in {"offload", "recompute", "verify", "cache"}:
        known = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
        return known.get(text.lower(), text)
    if re.fullmatch(r"\d{1,30}", text):
        return int(text)
    if re.fullmatch(r"\d*\.\d+", text):
        return float(text)
    return text


def parse_bytes(text: str) -> int | None:
    """A size in words as bytes; None for what is none.

    >>> parse_bytes("48GiB"), parse_bytes("48 apples")
    (51539607552, None)
    """
    match = _SIZE.match(text)
    unit = _UNITS.get(match["unit"].lower()) if match else None
    return None if match is None or unit is None else int(Decimal(match["number"]) * unit)


def _bytes(value: Any) -> int | None:
    """Bytes, zero or more, from a number or a size in words; None for what is neither, or more than there can be."""
    size = parse_bytes(value) if isinstance(value, str) else value
    if isinstance(size, int) and not isinstance(size, bool) and 0 <= size < MOST:
        return size
    return None


_BUDGETS = 'bytes (an int below 2**62), "48GiB", a ratio in (0, 1] of the unplanned peak (a float), "min" or "auto"'


def _budget(key: str, value: Any) -> int | float | str:
    if isinstance(value, str) and value in ("min", "auto"):
        return str(value)
    if isinstance(value, str) and _RATIO.fullmatch(value):  # of bytes there are no fractions
        value = float(value)
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    if size := _bytes(value):
        return size
    raise InvalidOption(key, value, _BUDGETS)


def _host_budget(key: str, value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return "auto"
    if (size := _bytes(value)) is not None:
        return size
    raise InvalidOption(key, value, 'bytes (an int below 2**62), "48GiB" or "auto"')


def _reserve(key: str, value: Any) -> int | None:
    if value is None:
        return None
    if (size := _bytes(value)) is not None:
        return size
    raise InvalidOption(key, value, 'bytes (an int below 2**62), "8GiB" or None')


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidOption(key, value, "True or False")


def _verify(key: str, value: Any) -> bool | Literal["poison"]:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "poison":
        return "poison"
    raise InvalidOption(key, value, 'True, False or "poison"')


def _offload(key: str, value: Any) -> bool | Literal["all"]:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "all":
        return "all"
    raise InvalidOption(key, value, 'True, False or "all"')


def _rows(key: str, value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST:
        return value
    raise InvalidOption(key, value, 'a positive number of token rows below 2**62, or "auto"')


def _calls(key: str, value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST:
        return value
    raise InvalidOption(key, value, 'a positive number of calls, or "auto"')


def _accumulate(key: str, value: Any) -> Literal["float32", "same"]:
    if isinstance(value, str) and value in ("float32", "same"):
        return "same" if value == "same" else "float32"
    raise InvalidOption(key, value, '"float32" or "same"')


def _tiles(key: str, value: Any) -> int | Literal["auto"]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST:
        return value
    raise InvalidOption(key, value, 'a positive number of tiles below 2**62, or "auto"')


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    raise InvalidOption(key, value, "a positive, finite number of seconds")


def _hardware(key: str, value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        if str(value) != "auto":
            resolve(str(value))
        return str(value)
    raise InvalidOption(key, value, 'a profile\'s name, a path, or "auto"')


def _path(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidOption(key, value, "the path of a folder, or None")
    folder = os.fsdecode(value)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error  # an OSError's own text has the whole path in it
        raise InvalidOption(key, value, f"a folder that can be made and written to ({cause})") from error
    return folder


_SET_BY_MEMO = {
    "custom_partitioner_fn",
    "allow_buffer_reuse",
    "graph_partition",
    "fx_graph_cache",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
}


def _patches(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise InvalidOption(key, value, "a dict of Inductor config names and values")
    from torch._inductor import config as inductor  # loads Inductor

    config: Any = inductor  # torch adds its methods at run time
    known = config.get_config_copy()
    for name, setting in value.items():
        if name not in known:
            raise InvalidOption(f"{key}[{name!r}]", setting, "a name in torch._inductor.config")
        if name in _SET_BY_MEMO:
            raise InvalidOption(f"{key}[{name!r}]", setting, "nothing: memo sets it itself, leave it out")
        kind = _kind_of(known[name], config.get_type(name))
        if kind is not None and not _is_a(kind, setting):
            raise InvalidOption(f"{key}[{name!r}]", setting, f"a value of type {kind.__name__}")
    if value.get("cpp_wrapper"):
        raise InvalidOption(f"{key}['cpp_wrapper']", True, "False: memo places buffers in the Python wrapper")
    return dict(value)


def _kind_of(current: Any, declared: Any) -> type | None:
    """The type that a setting of Inductor's must have; None where it may be absent, or is no plain value."""
    plain = type(current) in (bool, int, float, str)
    return type(current) if plain and type(None) not in get_args(declared) else None


def _is_a(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _group(key: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and 0 < len(value) < 300):
        return value
    raise InvalidOption(key, value, "the name of a process group, or None")


def _mode(key: str, value: Any) -> str | None:
    if value is None:
        return None
    from torch._inductor import list_mode_options  # loads Inductor

    if not isinstance(value, str) or value not in list_mode_options():
        raise InvalidOption(key, value, f"None or one of {', '.join(sorted(list_mode_options()))}")
    return str(value)


def _lengths(key: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value in ("exact", "range"):
        return str(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(_rows(key, v), int) for v in value):
        return tuple(sorted(value))
    raise InvalidOption(key, value, '"range", "exact", or a list of lengths such as [4096, 8192]')


_CHECKS = {
    "memory_budget": _budget,
    "reserve": _reserve,
    "host_budget": _host_budget,
    "offload": _offload,
    "recompute": _flag,
    "token_slice": _rows,
    "tiles": _tiles,
    "accumulate": _accumulate,
    "solver_time_limit": _seconds,
    "hardware": _hardware,
    "dump": _path,
    "verify": _verify,
    "inductor": _patches,
    "sequence_parallel": _group,
    "mode": _mode,
    "lengths": _lengths,
    "calls": _calls,
    "cache": _flag,
}
