"""Transfers of emitted code that overlap: what moves, how far, and what it costs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_compile.codegen.emitted.body import read_body
from memo_compile.codegen.emitted.overlap import Rates, live_at, overlapped, read_lines, replay

SIZE = 4 * 1024  # bytes of a buffer of 1 024 numbers
LINKS = Rates(SIZE, SIZE)  # a buffer a second


def buffer(name):
    return f"{name} = empty_strided_cpu((1024, ), (1, ), torch.float32)"


def moved(kind, name, at):
    return f"torch.ops.memo.{kind}.default({name}, lease, {at})"


def lines_of(*texts):
    """The lines of a body; what calls `work` takes a second."""
    return read_lines(texts, {}, [float("work" in t) for t in texts])


def body_of(lines):
    return read_body("\n".join(line.text for line in lines), [], ["lease", "x"], lambda _: None)


def arranged(lines, most=0):
    return overlapped(lines, live_at(lines, body_of(lines), {}), LINKS, most)


def texts(lines):
    return [line.text for line in lines]


FORWARD = lines_of(
    buffer("a"),
    "work(x, a)",
    moved("offload", "a", 0),
    moved("offload_wait", "a", 0),
    "del a",
    buffer("b"),
    "work(x, b)",
    "del b",
    buffer("c"),
    buffer("d"),
    "work(x, c, d)",
    "del c",
    "del d",
)


def test_a_wait_for_an_offload_stands_where_its_copy_has_ended():
    order = texts(arranged(FORWARD))
    assert order.index(moved("offload_wait", "a", 0)) == order.index("work(x, b)") + 1
    assert replay(FORWARD, LINKS) == 4.0
    assert replay(arranged(FORWARD), LINKS) == 3.0


def test_what_drops_a_buffer_goes_with_its_wait():
    order = texts(arranged(FORWARD))
    assert order.index("del a") == order.index(moved("offload_wait", "a", 0)) + 1


def test_a_wait_stays_where_more_would_be_held():
    """b and c together are as much as there may be."""
    crowded = lines_of(*texts(FORWARD)[:5], buffer("b"), buffer("c"), "work(x, b, c)", "del b", "del c")
    wait, work = moved("offload_wait", "a", 0), "work(x, b, c)"
    assert texts(arranged(crowded)).index(wait) < texts(arranged(crowded)).index(work)
    roomy = texts(arranged(crowded, most=3 * SIZE))
    assert roomy.index(wait) > roomy.index(work)


def test_nobody_writes_over_what_is_still_being_copied():
    reused = lines_of(
        *texts(FORWARD)[:4], "b = a; del a  # reuse", "work(x, b)", buffer("c"), buffer("d"), "work(c, d)"
    )
    assert texts(arranged(reused)) == texts(reused)


BACKWARD = lines_of(
    buffer("a"),
    buffer("b"),
    "work(x, a, b)",
    "del a",
    "work(x, b)",
    "del b",
    buffer("c"),
    moved("prefetch_", "c", 0),
    moved("wait_", "c", 0),
    "work(c)",
    "del c",
)


def test_a_prefetch_starts_with_its_landing_place_when_its_link_needs_it():
    order = texts(arranged(BACKWARD))
    at = order.index(moved("prefetch_", "c", 0))
    assert order[at - 1] == buffer("c")
    assert order[at + 1] == "work(x, b)"
    assert (replay(BACKWARD, LINKS), replay(arranged(BACKWARD), LINKS)) == (4.0, 3.0)


def test_a_slice_that_comes_again_starts_when_its_own_wait_needs_it():
    again = lines_of(
        *(buffer("a"), moved("prefetch_", "a", 0), moved("wait_", "a", 0), "work(a)", "del a"),
        *("work(x)", "work(x)"),
        *(buffer("b"), moved("prefetch_", "b", 0), moved("wait_", "b", 0), "work(b)", "del b"),
    )
    order = texts(arranged(again))
    at = order.index(moved("prefetch_", "b", 0))
    assert order[at + 1 : at + 3] == ["work(x)", moved("wait_", "b", 0)]
    assert (replay(again, LINKS), replay(arranged(again), LINKS)) == (6.0, 5.0)


def test_a_prefetch_stays_where_its_place_would_raise_the_peak():
    crowded = lines_of(buffer("a"), buffer("b"), "work(x, a, b)", "del a", "del b", *texts(BACKWARD)[6:])
    order = texts(arranged(crowded))
    assert order.index(buffer("c")) > order.index("work(x, a, b)")


def test_a_prefetch_starts_after_what_else_is_written_to_its_place():
    shared = lines_of(*texts(BACKWARD)[:7], "work(x, c)", *texts(BACKWARD)[7:])
    order = texts(arranged(shared))
    assert order.index(moved("prefetch_", "c", 0)) > order.index("work(x, c)")


def test_nothing_moves_out_of_a_block_of_another_device():
    inside = [
        "with torch.cuda._DeviceGuard(0):",
        "    torch.cuda.set_device(0)",
        *(f"    {t}" for t in texts(BACKWARD)),
    ]
    order = texts(arranged(lines_of(*inside)))
    assert order[:2] == inside[:2]
    assert order[2:] == [f"    {t}" for t in texts(arranged(BACKWARD))]


def test_statements_over_several_lines_are_left_alone():
    assert read_lines(["work(", ")"], {}, [0.0, 0.0]) is None


def test_a_view_of_a_buffer_moves_its_own_bytes():
    view = "reinterpret_tensor(a, (256, ), (1, ), 0)"
    assert [line.bytes for line in lines_of(buffer("a"), moved("offload", view, 0))] == [SIZE, SIZE // 4]


@st.composite
def bodies(draw):
    """Work on buffers of one or two units that come and go, among offloads and prefetches with their waits.

    Some slices come several times, to a buffer of their own each time.
    """
    out, live, came = [], [], []
    for number in range(draw(st.integers(3, 14))):
        name = f"b{number}"
        kind = draw(st.sampled_from(["work", "offload", "prefetch"]))
        out.append(buffer(name))
        if kind == "prefetch":
            came.append(draw(st.sampled_from([number, *came])))
            out += [moved("prefetch_", name, came[-1]), moved("wait_", name, came[-1])]
        out.append(f"work(x, {', '.join([name, *live[-2:]])})")
        if kind == "offload":
            out += [moved("offload", name, number), moved("offload_wait", name, number), f"del {name}"]
        else:
            live.append(name)
        while live and draw(st.booleans()):
            out.append(f"del {live.pop(draw(st.integers(0, len(live) - 1)))}")
    return out


@settings(deadline=None)
@given(bodies())
def test_the_peak_never_rises_and_the_step_never_takes_longer(body):
    before = lines_of(*body)
    after = arranged(before)
    assert sorted(texts(after)) == sorted(body)
    assert max(live_at(after, body_of(after), {})) <= max(live_at(before, body_of(before), {}))
    assert replay(after, LINKS) <= replay(before, LINKS) + 1e-9
    for kind in ("offload", "prefetch_"):
        assert [line.at for line in after if line.kind == kind] == [line.at for line in before if line.kind == kind]


@settings(deadline=None)
@given(bodies())
def test_every_name_is_bound_before_its_use_and_dropped_after_it(body):
    known, dropped = {"x", "lease", "work", "torch", "empty_strided_cpu"}, set()
    for line in arranged(lines_of(*body)):
        assert line.names - line.binds <= known
        assert not line.names & dropped
        known |= line.binds
        dropped |= line.names if line.kind == "delete" else set()


@settings(deadline=None)
@given(bodies())
def test_every_wait_stands_after_its_start(body):
    order = arranged(lines_of(*body))
    place = {(line.kind, line.buffer): i for i, line in enumerate(order)}
    for (kind, name), i in place.items():
        if kind in ("offload", "prefetch_"):
            assert place[{"offload": "offload_wait", "prefetch_": "wait_"}[kind], name] > i


@pytest.mark.parametrize("kind", ["offload_wait", "wait_"])
def test_a_replay_waits_for_what_has_not_ended(kind):
    start = {"offload_wait": "offload", "wait_": "prefetch_"}[kind]
    lines = lines_of(buffer("a"), moved(start, "a", 0), "work(x)", moved(kind, "a", 0), "work(x)")
    assert replay(lines, Rates(SIZE / 3, SIZE / 3)) == 4.0
