"""What a user may ask for, and what he is told when it cannot be."""

import pytest
import torch

from memo_compile.errors import MOST_SHOWN, InvalidOption, ReserveTooLarge, UnknownOption
from memo_compile.options import Options
from memo_compile.trace.setting import BYTES_PER_TRAINABLE, auto_budget

ENDLESS = 10**5000  # Python turns no more than 4300 digits into text, or back


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
        ("tiles", 0),
        ("tiles", "many"),
        ("accumulate", "bfloat16"),
        ("solver_time_limit", 0),
        ("solver_time_limit", 10**400),
        ("solver_time_limit", float("inf")),
        ("solver_time_limit", float("nan")),
        ("hardware", "abacus"),
        ("dump", 7),
        ("verify", None),
        ("inductor", ["max_autotune"]),
        ("inductor", {"no_such_setting": 1}),
        ("inductor", {"cpp_wrapper": True}),
        ("mode", "fastest"),
        ("reserve", -1),
        ("reserve", 2**62),
        ("reserve", "5000000TiB"),
        ("host_budget", 2**62),
        ("host_budget", "5000000TiB"),
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


@pytest.mark.parametrize("value", [[1], "abc", {"verify"}], ids=str)
def test_options_are_a_dict(value):
    with pytest.raises(InvalidOption, match="options"):
        Options.parse(value, {})
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="memo_eager", options=value)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"'options' = .*a dict of options"):
        compiled(torch.ones(1, 2))


@pytest.mark.parametrize("key", list(Options.__dataclass_fields__))
def test_an_int_without_end_is_refused_in_a_few_words(key):
    with pytest.raises(InvalidOption, match=key) as caught:
        Options.parse({key: ENDLESS}, {})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", [f.upper() for f in Options.__dataclass_fields__ if f != "inductor"])
def test_digits_without_end_from_the_environment_are_refused_in_a_few_words(name):
    with pytest.raises(InvalidOption, match=name.lower()) as caught:
        Options.parse({}, {f"MEMO_{name}": "9" * 5000})
    assert len(str(caught.value)) < 1000


def test_a_long_value_is_shown_by_its_ends():
    text = str(InvalidOption("dump", "start" + "x" * 5000 + "end", "a folder"))
    assert "start" in text
    assert "end'" in text
    assert len(text) < MOST_SHOWN + 100


def test_an_unknown_key_without_end_is_told():
    with pytest.raises(UnknownOption, match="memory_budget"):
        Options.parse({ENDLESS: 1}, {})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("max_fusion_size", "big", "int"),
        ("max_fusion_size", True, "int"),
        ("max_fusion_size", 6.5, "int"),
        ("max_autotune", 1, "bool"),
        ("max_autotune", "yes", "bool"),
        ("cpu_backend", 7, "str"),
        ("cpp.max_horizontal_fusion_size", None, "int"),
    ],
)
def test_a_patch_of_the_wrong_type_names_the_setting_and_its_type(name, value, kind):
    with pytest.raises(InvalidOption, match=rf"inductor\['{name}'\].*type {kind}") as caught:
        Options.parse({"inductor": {name: value}}, {})
    assert repr(value) in str(caught.value)


def test_a_patch_may_be_of_its_type_or_of_any_where_none_is_allowed():
    patches = {
        "max_fusion_size": 8,
        "max_autotune": True,
        "cpu_backend": "cpp",
        "realize_opcount_threshold": 12,
        "cpp.simdlen": None,
        "post_grad_custom_pre_pass": print,
    }
    assert Options.parse({"inductor": patches}, {}).inductor == patches


def test_a_patch_of_a_float_may_be_an_int():
    from torch._inductor import config

    name = next(name for name, value in config.get_config_copy().items() if config.get_type(name) is float)
    assert Options.parse({"inductor": {name: 1}}, {}).inductor == {name: 1}
    with pytest.raises(InvalidOption, match="type float"):
        Options.parse({"inductor": {name: True}}, {})


@pytest.mark.parametrize(
    "name",
    [
        "allow_buffer_reuse",
        "graph_partition",
        "custom_partitioner_fn",
        "fx_graph_cache",
        "_pre_fusion_custom_pass",
        "_post_fusion_custom_pass",
    ],
)
def test_what_memo_sets_itself_is_refused(name):
    with pytest.raises(InvalidOption, match=rf"{name}.*memo sets it"):
        Options.parse({"inductor": {name: False}}, {})


def test_auto_leaves_the_reserve_and_a_margin():
    assert auto_budget(1000, 150, trainable=7) == 800
    assert auto_budget(1000, None, trainable=10) == 950 - 10 * BYTES_PER_TRAINABLE


@pytest.mark.parametrize(("reserve", "trainable"), [(950, 0), (2**40, 0), (None, 1000)])
def test_a_reserve_that_leaves_nothing_is_named(reserve, trainable):
    with pytest.raises(ReserveTooLarge, match=r"1,000 bytes are free.*reserve = [\d,]+ bytes.*Lower reserve"):
        auto_budget(1000, reserve, trainable)


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


def test_a_mode_beside_the_options_is_one_of_them():
    assert Options.parse({"verify": True}, {}, mode="max-autotune") == Options(verify=True, mode="max-autotune")


@pytest.mark.parametrize("backend", ["memo", "memo_eager"])
def test_mistakes_come_through_torch_compile(backend):
    compiled = torch.compile(lambda x: x.sum(), backend=backend, options={"memory_budget": 2.0})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"memory_budget.*2\.0.*ratio"):
        compiled(torch.ones(3, requires_grad=True))
