"""Questions that stay open until a card answers them: the probe that asks, what its answer means, what is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.rows import Row


@dataclass(frozen=True)
class Question:
    """`means` says what is to be done for which answer, `known` what was found or mended so far, and where."""

    asks: str
    probe: str
    means: str
    known: str


QUESTIONS = (
    Question(
        "Who page-locks 8 GiB at 256K tokens?",
        "pinned",
        "`torch` grows: a copy goes through torch's own pinned memory, in the part of the step where it "
        "grows. `memo` grows beyond `planned`: a second block, which the pool should have traded. Neither: it"
        " is gone",
        "a row of ac084d2 held 2^33 + 12 bytes more than planned, memo's blocks and torch's together. 12 "
        "bytes are `.item()`'s. At 128K torch had locked no more than these (4ca084a), and copies of any kind"
        " lock nothing (4ca084a). 2^33 bytes are also four layer inputs: a block left by another plan, which "
        "the pool of that commit kept beside the new one, and today's does not "
        "(`tests/runtime/test_host.py`). Not proved",
    ),
    Question(
        "Are dropout's masks right behind a transposed input (pytorch#198333)?",
        "dropout",
        "`same_mask` false: recomputed masks differ, and memo has to keep them. `groups_alike` far from "
        "0.125: torch's bits are not independent, which memo's seeds do not change",
        "by Inductor of torch 2.11 on an H200 yes: half is set, 0.125, the same mask in the backward (4ca084a)",
    ),
    Question(
        "Do CUDA graphs of a step that offloads replay, and after `reset()` too?",
        "graphs",
        "a figure above 1e-5: the graph replays with bytes that are not its own any more. An error: that way "
        "is refused",
        "captured by hand, gradients are right after `reset()` (`tests/gpu/test_streams.py`, 68 passed at "
        '9bba789): what a graph has captured stays with the pool. `mode="reduce-overhead"` has not run',
    ),
    Question(
        "What does the link move when both ways are busy, and are there NUMA nodes?",
        "link",
        "`each_at_once_GBs` over `to_host_GBs` is the profile's `both_ways`. Products slower beside copies "
        "than alone: copies have a price that plans do not count",
        "55.2 GB/s alone, 49.9 at once, 0.163 s of products alone and 0.161 beside; one NUMA node (H200, "
        "4ca084a): in the profile. On machines with several, blocks are bound to the GPU's "
        "(`runtime/numa.py`)",
    ),
    Question(
        "Which kind of memory is page-locked fastest?",
        "locking",
        "the last kind is memo's; one that locks faster, copies as fast and is empty in children would be better",
        "mended: private mappings that ask for huge pages. 4 GiB take 1.7 s, shared ones 2.4 (H200, 4ca084a)",
    ),
    Question(
        "Does an attempt to land ahead make the allocator wait near the device's limit?",
        "prefetch_buffers",
        "`num_alloc_retries` or `num_sync_all_streams` grow with just enough memory: an attempt costs what it"
        " should save",
        "mended: what the allocator and the device have free is looked at before (`StreamEngine.spare`, "
        "tested on simulated streams in `tests/runtime/test_streams.py`). Not run on a card",
    ),
    Question(
        "Do lengths in turn register host memory at every step?",
        "lengths",
        "`in turns` slower than `repeated`: blocks come and go",
        "mended: a block serves any request down to a quarter of its size (`tests/runtime/test_host.py`). Not"
        " run on a card",
    ),
    Question(
        "What do many small copies cost?",
        "pieces",
        "`processor_s` at once below one by one, and dense by address below by torch: copies by address pay. "
        "`device_s` should be alike",
        "32 pieces of 8 MiB: 24 µs of the processor at once, 574 one by one, 4.9 ms of the device either way "
        "(H200, 4ca084a)",
    ),
    Question(
        "Where does the time of a step at 8K go?",
        "step",
        "`times_plain` above 1.05: issuing is what to shorten, and `memo_ops` says whose it is. `gaps` larger"
        " than Inductor's: the device waits for the processor, or for copies",
        "on the CPU, at 8 layers whose kernels take next to nothing: 1.02 without a budget, 1.21 within half "
        "(`bench/results/bookkeeping.md`). Not run on a card",
    ),
    Question(
        "Does `memo doctor --measure` take less than a minute?",
        "profile",
        "`took_s` above 60: fewer sizes. The shares are what the built-in profile should have",
        "not run on a card with shapes by class. With ops at a third of a card's rates its sizes take 19 s "
        "(`tests/hardware/test_calibration.py`)",
    ),
)


def table(parts: Mapping[str, Row]) -> str:
    """Each question with what is known, and what has asked it where."""
    lines = ["| question | probe | what its answer means | known |", "|---|---|---|---|"]
    for q in QUESTIONS:
        asked = [_asked(name, part) for name, part in sorted(parts.items()) if name.endswith(f"/probe {q.probe}")]
        lines.append(f"| {q.asks} | {q.probe} | {q.means} | {'; '.join([q.known, *asked])} |")
    return "\n".join(lines)


def _asked(name: str, part: Row) -> str:
    how = "asked" if part["finished"] else "asked, without an answer,"
    return f"{how} on {name.split('/')[0].removeprefix('NVIDIA ')} at {part['commit'] or part['code']}, see below"
