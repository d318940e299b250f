"""Bytes at torch's allocator, above what was held before."""

import threading

import torch

from memo_compile.runtime.memory_usage import Usage, measure_peak, usage

KIB = 1 << 10


def block(kib):
    return torch.empty(kib * KIB, dtype=torch.uint8)


def test_the_peak_is_the_most_that_was_held_at_once():
    def run():
        first = block(64)
        second = block(32)
        del first
        third = block(16)
        return second, third

    assert measure_peak(run) == 96 * KIB


def test_what_was_held_before_does_not_count_and_what_stays_does():
    held = [block(64)]
    assert measure_peak(lambda: held.append(block(8))) == 8 * KIB
    assert measure_peak(held.clear) == 0


def test_arguments_are_passed_on():
    assert measure_peak(torch.ones, KIB, dtype=torch.float64) == 8 * KIB


def test_usage_gives_the_result_the_peak_and_what_is_held_in_the_end():
    result, used = usage(lambda kib: [block(kib), block(kib), block(kib)][:2], 4)
    assert len(result) == 2
    assert used == Usage(peak=12 * KIB, held=8 * KIB)


def test_a_running_profiler_is_left_alone():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert usage(block, 4)[1] is None


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_on_the_cpu_a_thread_is_measured_where_it_runs_and_not_from_another():
    """As the docstring says. Where the first fails, torch has learned it: say so there, and let it be seen."""
    assert measure_peak(in_thread, lambda: block(64)) == 0
    assert "not seen" in measure_peak.__doc__
    peaks = []
    in_thread(lambda: peaks.append(measure_peak(block, 64)))
    assert peaks == [64 * KIB]


def test_autograds_threads_are_seen():
    """On the CPU a backward runs in the thread that asks for it."""
    x = torch.zeros(64 * KIB // 4, requires_grad=True)
    assert measure_peak(lambda: (x * x).sum().backward()) >= 2 * 64 * KIB


def test_measuring_says_nothing(capfd):
    """What torch's profiler reports of itself is not for who asked for a number."""
    assert measure_peak(lambda: block(8)) == 8 * KIB
    assert capfd.readouterr() == ("", "")
