"""The probes, in small and on the CPU: each answers in the words by which `bench.questions` reads it."""

from types import SimpleNamespace

import pytest

pytest.importorskip("bench.probes", reason="the benchmarks lie beside the package, not in it")

from bench import agenda, questions
from bench.probes import kernels
from bench.probes.__main__ import PROBES, answer
from bench.probes.timing import Scene

TINY = Scene(tiny=True)


def test_every_probe_is_on_the_agenda_and_every_question_has_one():
    asked = {item.name.removeprefix("probe ") for item in agenda.agenda() if item.name.startswith("probe ")}
    assert asked == set(PROBES)
    assert {q.probe for q in questions.QUESTIONS} <= asked


def test_masks_of_dropout():
    found = answer("dropout", TINY)
    assert set(found) == {"aot_eager", "memo at min", "memo at 0.5"}
    for way in found.values():
        assert way["same_mask"]
        assert way["share"] == pytest.approx(0.5, abs=0.05)
        assert way["groups_alike"] == pytest.approx([0.125, 0.125], abs=0.02)


@pytest.mark.grid
def test_lengths_in_turn():
    found = answer("lengths", TINY)
    assert found["repeated"].keys() == found["in turns"].keys() == {"long_s", "short_s"}
    assert found["host_GiB_at_the_end"] == found["host_GiB_after_both"] > 0


def test_whose_memory_is_page_locked():
    found = answer("pinned", TINY)
    assert found["before"] == {"memo": 0, "torch": 0}
    assert found["second update"] == {"memo": found["planned"], "torch": 0}
    assert found["plans"] == 1


@pytest.mark.grid
def test_where_a_steps_time_goes():
    found = answer("step", TINY)
    assert found["aot_eager"]["times_plain"] == 1
    for way in found.values():
        assert way["issued"] > 0
        assert way["kernels"] == 0  # of a device, which is not here


@pytest.mark.parametrize("name", ["graphs", "prefetch_buffers", "link", "locking", "pieces", "pins", "profile"])
def test_what_only_a_card_can_be_asked_says_so(name):
    assert answer(name, TINY) == {"skipped": "asks a CUDA device"}


def test_gaps_are_when_no_kernel_ran():
    assert kernels._gaps([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (7.0, 7.5)]) == 2.0 + 1.0
    assert [kernels._kind(n) for n in ("Memcpy DtoH", "nvjet_tst_128", "triton_poi_0", "fmha_cutlassF", "x")] == [
        "copies",
        "matmuls",
        "fused",
        "attention",
        "other",
    ]


def test_of_memos_ops_one_within_another_counts_once():
    def event(name, start, end, device="DeviceType.CPU"):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    events = [
        event("memo::offload", 0.0, 1000.0),
        event("memo::wait_", 200.0, 400.0),
        event("memo::prefetch_", 2000.0, 2500.0),
        event("aten::mm", 3000.0, 9000.0),
        event("memo::offload", 0.0, 9000.0, "DeviceType.CUDA"),
    ]
    assert kernels._own_ops(events) == {"memo_ops": 1.5, "memo_ops_count": 3}
