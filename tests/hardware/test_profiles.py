"""Device profiles: built in, from a file, of this machine."""

import json
from dataclasses import asdict, replace

import pytest

from memo_compile.errors import InvalidOption
from memo_compile.hardware.efficiency import share_at, share_in
from memo_compile.hardware.host_memory import CgroupLimit, cgroup_limits, free_host_memory, memory_limit
from memo_compile.hardware.profiles import (
    PROFILES,
    from_fields,
    is_calibrated,
    load,
    machine_name,
    resolve,
    save,
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


FEW, MANY = ((1e9, 0.1), (1e11, 0.3)), ((1e9, 0.4), (1e11, 0.8))


def test_a_share_lies_between_those_of_the_classes_around_it():
    classes = ((16.0, FEW), (256.0, MANY))
    assert share_in(classes, 16, 1e10) == pytest.approx(0.2)
    assert share_in(classes, 64, 1e10) == pytest.approx((0.2 + 0.6) / 2)
    assert share_in(classes, 1, 1e11) == 0.3
    assert share_in(classes, float("inf"), 1e15) == 0.8


def test_a_profile_with_a_field_of_an_earlier_name_is_read():
    mine = replace(PROFILES["h200"], matmuls_by_rows=((16.0, FEW),))
    raw = asdict(mine)
    assert from_fields({"products_by_rows": raw.pop("matmuls_by_rows"), **raw}) == mine


def test_classes_are_what_counts_where_there_are_any():
    plain = PROFILES["h200"]
    mine = replace(plain, matmuls_by_rows=((16.0, FEW), (256.0, MANY)), attention_by_heads=((4.0, FEW),))
    assert plain.matmul_share(1e11, 16) == plain.matmul_share(1e11, 1 << 20)
    assert mine.matmul_share(1e11, 16) == 0.3
    assert mine.matmul_share(1e11, 256) == 0.8
    assert mine.attention_share(1e9, 32, backward=False) == 0.1
    assert mine.attention_share(1e9, 32, backward=True) == plain.attention_share(1e9, 32, backward=True)


def test_a_profile_with_classes_survives_its_file_and_one_from_before_them_is_read(tmp_path):
    mine = replace(PROFILES["h200"], matmuls_by_rows=((16.0, FEW), (256.0, MANY)), attention_by_heads=((4.0, FEW),))
    save(mine, tmp_path / "mine.json")
    assert load(tmp_path / "mine.json") == mine
    raw = json.loads((tmp_path / "mine.json").read_text())
    for name in ("matmuls_by_rows", "attention_by_heads", "attention_backward_by_heads"):
        del raw[name]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    assert load(tmp_path / "old.json") == PROFILES["h200"]


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


@pytest.mark.parametrize(
    "change",
    [
        {"launch_overhead": "5e-6"},
        {"launch_overhead": -1e-6},
        {"launch_overhead": float("nan")},
        {"launch_overhead": float("inf")},
        {"d2h": float("inf")},
        {"h2d": float("nan")},
        {"memory": "80GiB"},
        {"memory_bandwidth": 10**400},
        {"link": True},
        {"link_efficiency": 0},
        {"peak_flops": {"float32": float("inf")}},
        {"peak_flops": ["float32"]},
        {"matmul_efficiency": [[0, 0.5], [1e9, 0.6]]},
        {"matmul_efficiency": [[-1e9, 0.5], [1e9, 0.6]]},
        {"matmul_efficiency": [[1e9, 0.5], [1e9, 0.6]]},
        {"matmul_efficiency": [[1e9, float("nan")]]},
        {"attention_efficiency": [[1e9]]},
        {"attention_backward_efficiency": 0.5},
        {"matmuls_by_rows": [[64, [[1e9, 0.5]]], [16, [[1e9, 0.5]]]]},
        {"matmuls_by_rows": [[64, []]]},
        {"attention_by_heads": [[0, [[1e9, 0.5]]]]},
        {"attention_backward_by_heads": 8},
    ],
    ids=str,
)
def test_a_number_that_costs_nothing_or_everything_is_refused_by_name(tmp_path, change):
    """Costs are divided by rates and are logarithms of sizes: what cannot be fails here, not in a plan."""
    save(replace(PROFILES["cpu"], **change), tmp_path / "bad.json")
    with pytest.raises(InvalidOption, match=rf"bad.json.*{next(iter(change))} .*must") as caught:
        resolve(str(tmp_path / "bad.json"))
    assert "finite" in str(caught.value)


def test_a_launch_may_cost_nothing(tmp_path):
    save(replace(PROFILES["cpu"], launch_overhead=0), tmp_path / "mine.json")
    assert load(tmp_path / "mine.json").launch_overhead == 0


NAMES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def cgroup(folder, version, limit, used, cache=0):
    """A cgroup's files as the kernel writes them."""
    names = NAMES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\nfile 2\n")


def membership(tmp_path, *lines):
    path = tmp_path / "membership"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_limits_of_version_2_are_those_of_the_own_group_and_of_all_above(tmp_path):
    root = tmp_path / "cgroup"
    job = root / "system.slice" / "slurmstepd.scope" / "job_7"
    cgroup(job / "step_0" / "task_0", 2, "max", 300)
    cgroup(job / "step_0", 2, 900, 500, cache=100)
    cgroup(job, 2, 1000, 800)
    cgroup(job / "step_1", 2, 10, 10)
    (root / "system.slice").joinpath("memory.max").write_text("max\n")
    own = membership(tmp_path, "0::/system.slice/slurmstepd.scope/job_7/step_0/task_0")
    assert cgroup_limits(root, own) == [CgroupLimit(900, 500), CgroupLimit(1000, 200)]


def test_limits_of_version_1_are_those_of_the_memory_controller(tmp_path):
    root = tmp_path / "cgroup"
    none = 2**63 - 4096
    cgroup(root / "memory", 1, none, 5000)
    cgroup(root / "memory" / "slurm", 1, 2000, 1500)
    cgroup(root / "memory" / "slurm" / "job_7", 1, 1000, 700, cache=50)
    cgroup(root / "memory" / "cpu_only", 1, 10, 10)
    own = membership(
        tmp_path, "9:name=systemd:/init", "4:cpu,cpuacct:/cpu_only", "3:hugetlb,memory:/slurm/job_7", "0::/x"
    )
    assert cgroup_limits(root, own) == [CgroupLimit(1000, 350), CgroupLimit(2000, 500)]


def test_a_container_that_is_told_the_hosts_path_reads_its_root(tmp_path):
    for root, version, own in (
        (tmp_path / "two", 2, "0::/docker/abc"),
        (tmp_path / "one" / "memory", 1, "4:memory:/docker/abc"),
    ):
        cgroup(root, version, 1000, 400)
        mount = root if version == 2 else root.parent
        assert cgroup_limits(mount, membership(tmp_path, own)) == [CgroupLimit(1000, 600)]


def test_a_group_over_its_limit_has_nothing_left(tmp_path):
    cgroup(tmp_path / "cgroup", 2, 1000, 1200)
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "nowhere") == [CgroupLimit(1000, 0)]


def test_without_cgroups_there_is_no_limit(tmp_path):
    assert cgroup_limits(tmp_path, membership(tmp_path, "0::/user.slice")) == []


def test_the_smallest_of_nested_limits_counts(monkeypatch):
    monkeypatch.setattr(
        "memo_compile.hardware.host_memory.cgroup_limits", lambda: [CgroupLimit(900, 500), CgroupLimit(1000, 200)]
    )
    assert memory_limit() == 900
    assert free_host_memory() == 200
    monkeypatch.setattr("memo_compile.hardware.host_memory.cgroup_limits", list)
    assert memory_limit() is None
    assert free_host_memory() > 2**20


def test_rates_of_a_built_in_profile_are_no_machines_own():
    assert not any(is_calibrated(profile) for profile in PROFILES.values())
    assert is_calibrated(replace(PROFILES["cpu"], name="this machine", d2h=5e9))
