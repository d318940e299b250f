"""What a user may ask for, and what he is told when it cannot be."""

import pytest
import torch

from memo_compile.errors import InvalidOption, UnknownOption
from memo_compile.options import Options


def test_defaults_need_no_options():
    assert Options.parse(None, {}) == Options()


@pytest.mark.parametrize(
    ("budget", "parsed"),
    [
        (1024, 1024),
        ("2KiB", 2048),
        ("1.5 MB", 1_500_000),
        (0.5, 0.5),
        (1.0, 1.0),
        ("min", "min"),
        ("auto", "auto"),
        ("0.5", 0.5),
    ],
)
def test_a_budget_is_bytes_a_ratio_or_a_word(budget, parsed):
    assert Options.parse({"memory_budget": budget}, {}).memory_budget == parsed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory_budget", 0),
        ("memory_budget", -5),
        ("memory_budget", 1.5),
        ("memory_budget", 0.0),
        ("memory_budget", "much"),
        ("memory_budget", True),
        ("host_budget", -1),
        ("host_budget", 0.5),
        ("offload", 1),
        ("recompute", "yes"),
        ("token_slice", 0),
        ("token_slice", 1.5),
        ("solver_time_limit", 0),
        ("hardware", "abacus"),
        ("dump", 7),
        ("verify", None),
        ("inductor", ["max_autotune"]),
        ("inductor", {"no_such_setting": 1}),
        ("inductor", {"cpp_wrapper": True}),
        ("mode", "fastest"),
        ("reserve", -1),
        ("memory_budget", "9" * 400 + "GiB"),
        ("memory_budget", torch.ones(2)),
        ("token_slice", torch.ones(2)),
        ("host_budget", torch.ones(2)),
        ("hardware", "x" * 5000),
        ("dump", "/dev/null"),
        ("dump", "/proc/nowhere"),
        ("dump", "a\0b"),
        ("mode", []),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(key, value):
    with pytest.raises(InvalidOption, match=key) as caught:
        Options.parse({key: value}, {})
    assert "Allowed" in str(caught.value)


def test_options_are_a_dict():
    with pytest.raises(InvalidOption, match="options"):
        Options.parse([1], {})


def test_an_unknown_key_names_the_known_ones():
    with pytest.raises(UnknownOption, match=r"memory_bugdet.*memory_budget"):
        Options.parse({"memory_bugdet": 1}, {})


def test_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"MEMO_MEMORY_BUDGET": "min", "MEMO_OFFLOAD": "0", "MEMO_DUMP": "2026", "MEMO_TOKEN_SLICE": "8"}
    parsed = Options.parse({"memory_budget": 0.5}, environment)
    assert (parsed.memory_budget, parsed.offload, parsed.dump, parsed.token_slice) == ("min", False, "2026", 8)


def test_what_has_no_form_as_text_is_not_ignored():
    with pytest.raises(InvalidOption, match="MEMO_INDUCTOR"):
        Options.parse({}, {"MEMO_INDUCTOR": "max_autotune=1"})


@pytest.mark.parametrize("backend", ["memo", "memo_eager"])
def test_mistakes_come_through_torch_compile(backend):
    compiled = torch.compile(lambda x: x.sum(), backend=backend, options={"memory_budget": 2.0})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"memory_budget.*2\.0.*ratio"):
        compiled(torch.ones(3, requires_grad=True))
