"""Device profiles: built in, from a file, of this machine."""

import pytest

from memo_compile.errors import InvalidOption
from memo_compile.hardware import PROFILES, free_host_memory, load, resolve, save


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
