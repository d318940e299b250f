"""Plans of two commits are compared value by value."""

import json

import pytest

pytest.importorskip("bench.same_plans", reason="the benchmarks lie beside the package, not in it")

from bench.same_plans import differences, keys, upgraded

PLAN = {
    "name": "graph_0", "backend": "memo", "budget": 4, "predicted_peak": 4, "least_peak": 4, "unplanned_peak": 8,
    "predicted_seconds": 1.0, "host_bytes": 0, "forward_flops": 1, "recomputed_flops": 0, "solver": "highs",
    "seconds": 3.0, "binding": "nothing", "token_axis": "", "prices": {}, "stops": [], "segments": [], "version": 1,
    "activations": [
        {"name": "a", "shape": [2], "dtype": "float32", "bytes": 8, "source": "", "tokens": 1, "kept": 1,
         "offloaded": 0, "recomputed": 0, "reason": "whole: no token axis reaches it", "layer": None},
    ],
    "buffers": [{"name": "bw:buf0", "segment": "s", "offset": 0, "size": 4, "start": 0, "end": 1}],
}  # fmt: skip


def test_a_value_that_differs_is_named_and_seconds_of_planning_are_none():
    other = json.loads(json.dumps(PLAN)) | {"seconds": 5.0}
    assert not list(differences(PLAN, other))
    other["activations"][0]["kept"] = 0
    assert list(differences([PLAN], [other])) == [("[0].activations[0].kept", 1, 0)]


def test_a_plan_of_version_1_is_compared_by_what_it_says():
    now = upgraded(PLAN)
    assert not list(differences(upgraded(now), now))
    assert (now["activations"][0]["cause"], now["activations"][0]["reason"]) == (
        "no token axis",
        PLAN["activations"][0]["reason"],
    )
    assert (now["buffers"][0]["side"], now["buffers"][0]["name"]) == ("backward", "buf0")
    assert keys(PLAN) <= keys(now)
    assert upgraded({"refused": "too small"}) == {"refused": "too small"}
