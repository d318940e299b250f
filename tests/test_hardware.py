"""Device profiles: built in, from a file, of this machine."""

from dataclasses import replace

import pytest

from memo_compile.errors import InvalidOption
from memo_compile.hardware import (
    PROFILES,
    free_host_memory,
    load,
    machine_name,
    resolve,
    save,
    share_at,
    stored_profile,
)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_built_in_profiles_name_their_source(name):
    profile = resolve(name)
    assert profile.source
    assert profile.flops("bfloat16") > 0
    assert profile.memory_bandwidth > profile.d2h > 0


def test_a_profile_survives_its_file(tmp_path):
    save(PROFILES["h200"], tmp_path / "mine.json")
    assert load(tmp_path / "mine.json") == PROFILES["h200"]
    assert resolve(str(tmp_path / "mine.json")) == PROFILES["h200"]


def test_a_broken_profile_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text('{"name": 1}')
    with pytest.raises(InvalidOption, match="hardware"):
        resolve(str(tmp_path / "bad.json"))


def test_free_host_memory_is_some():
    assert free_host_memory() > 2**20


def test_shares_of_the_peak_rise_with_the_size():
    for profile in PROFILES.values():
        for table in (profile.matmul_efficiency, profile.attention_efficiency, profile.attention_backward_efficiency):
            shares = [share_at(table, 10.0**e) for e in range(2, 16)]
            assert shares == sorted(shares)
            assert 0 < shares[0] < shares[-1] < 1


def test_auto_takes_the_profile_measured_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMO_PROFILES", str(tmp_path))
    mine = replace(PROFILES["cpu"], name=machine_name("cpu"), d2h=1.5e9)
    assert resolve("auto") == PROFILES["cpu"]
    save(mine, stored_profile("cpu"))
    assert resolve("auto") == mine
    assert resolve("cpu") == PROFILES["cpu"]


@pytest.mark.parametrize("changed", [{"name": "another processor"}, {"device": "cuda"}])
def test_a_profile_of_another_machine_or_device_is_not_used(monkeypatch, tmp_path, changed):
    monkeypatch.setenv("MEMO_PROFILES", str(tmp_path))
    save(replace(PROFILES["cpu"], **{"name": machine_name("cpu"), **changed}), stored_profile("cpu"))
    assert resolve("auto") == PROFILES["cpu"]


def test_tests_see_no_profile_of_this_machine():
    assert not stored_profile("cpu").exists()


@pytest.mark.parametrize(
    "change",
    [{"d2h": 0}, {"matmul_efficiency": []}, {"matmul_efficiency": [[1e9, 0.0]]}, {"peak_flops": {"bfloat16": 1e12}}],
)
def test_a_profile_that_cannot_be_is_refused(tmp_path, change):
    save(replace(PROFILES["cpu"], **change), tmp_path / "bad.json")
    with pytest.raises(InvalidOption, match="above 0"):
        resolve(str(tmp_path / "bad.json"))
