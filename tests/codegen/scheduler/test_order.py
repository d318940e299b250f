"""Transfers in emitted code stand where the plan has them, whatever is fused."""

import pytest
import torch
import zoo
from graphs import Chain

from memo_compile.codegen import compiler, inductor
from memo_compile.codegen.scheduler import order
from memo_compile.codegen.scheduler.order import Step, check_order, check_prefetched_reads, emitted_steps, planned_steps
from memo_compile.errors import EmittedOrderChanged

ALL = {"offload": "all"}
A, B, C = Step("a"), Step("b"), Step("c")
OUT, OUT_WAIT = Step("offload", 0), Step("offload_wait", 0)
IN, IN_WAIT = Step("prefetch_", 0), Step("wait_", 0)
IN2, IN2_WAIT = Step("prefetch_", 64), Step("wait_", 64)
PLAN = [A, OUT, B, OUT_WAIT, IN, IN2, C, IN_WAIT, IN2_WAIT]


def test_the_plans_own_order_passes():
    check_order(PLAN, PLAN)


def test_which_matmuls_overlap_is_no_matter():
    check_order(PLAN, [Step("other") if s == C else s for s in PLAN])


def test_where_nothing_is_left_to_overlap_with_the_order_is_the_plans():
    check_order([IN, C, IN_WAIT], [IN, IN_WAIT, C])


@pytest.mark.parametrize(
    ("emitted", "said"),
    [
        ([A, OUT, B, OUT_WAIT, IN2, IN, C, IN_WAIT, IN2_WAIT], "host offset 0 where the code has"),
        ([A, OUT, B, IN, IN2, C, IN_WAIT, IN2_WAIT], "offload_wait"),
        ([A, OUT, B, OUT_WAIT, IN2, C, IN_WAIT, IN2_WAIT], "prefetch_"),
        ([A, OUT_WAIT, OUT, B, IN, IN2, C, IN_WAIT, IN2_WAIT], "before its start"),
    ],
    ids=["prefetches swapped", "a wait lost", "a start lost", "wait first"],
)
def test_every_change_is_an_error(emitted, said):
    with pytest.raises(EmittedOrderChanged, match=said):
        check_order(PLAN, emitted)


@pytest.mark.parametrize(
    ("emitted", "alone"),
    [
        ([A, OUT, OUT_WAIT, B, IN, IN2, C, IN_WAIT, IN2_WAIT], 1),
        ([A, OUT, B, OUT_WAIT, C, IN, IN_WAIT, IN2, IN2_WAIT], 2),
        (PLAN, 0),
    ],
    ids=["out", "in", "none"],
)
def test_copies_without_computation_beside_them_are_told(emitted, alone):
    assert len(check_order(PLAN, emitted)) == alone


def test_steps_are_read_from_text():
    text = [
        "    # a comment",
        "    with torch.cuda._DeviceGuard(0):",
        "        extern_kernels.mm(x, y, out=buf3)",
        "        torch.ops.memo.offload.default(reinterpret_tensor(buf3, (4,), (1,), 0), buf1, 128)",
        "        cpp_fused_0(buf3)",
    ]
    assert emitted_steps(text) == [Step("extern_kernels.mm"), Step("offload", 128)]


PREFETCH_BUFFER = [
    "    buf1 = alloc_from_pool(arena, 0, torch.float64, (4, ), (1, ))",
    "    torch.ops.memo.prefetch_.default(buf1, lease, 0)",
    "    cpp_fused_0(buf0)",
    "    torch.ops.memo.wait_.default(buf1, lease, 0)",
    "    cpp_fused_1(reinterpret_tensor(buf1, (4, ), (1, ), 0))",
    "    del buf1",
]


def test_what_comes_back_is_used_after_its_wait():
    check_prefetched_reads(PREFETCH_BUFFER)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_kernel_that_uses_what_has_not_come_back_is_refused(place):
    kernel = PREFETCH_BUFFER[4]
    rest = [line for line in PREFETCH_BUFFER if line is not kernel]
    with pytest.raises(EmittedOrderChanged, match="cpp_fused_1 uses buf1"):
        check_prefetched_reads([*rest[:place], kernel, *rest[place:]])


@pytest.fixture(scope="module")
def emitted():
    """What the compiled graphs' texts say, beside their plans: (planned, emitted) for forward and backward."""
    seen = []

    def spy(planned, found):
        seen.append((planned, found))
        return check_order(planned, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "check_order", spy)
        torch.compile(Chain(4), backend="memo", options=ALL)(torch.randn(1024, 32)).sum().backward()
    return seen


def test_compiled_code_overlaps_where_the_plan_does(emitted):
    for planned, found in emitted:
        expected, got = order.overlaps(planned), order.overlaps(found)
        assert any(expected.values())
        assert all(bool(got[start]) >= bool(count) for start, count in expected.items())


def test_as_many_matmuls_stand_beside_a_copy_as_in_the_plan(monkeypatch):
    """A wait is moved along with its own offload, though the lease chains it to others'."""
    seen = []
    monkeypatch.setattr(compiler, "check_order", lambda planned, found: seen.append((planned, found)) or [])
    model, x = zoo.make("gpt").float(), zoo.batch(1)
    torch.compile(model, backend="memo", options=ALL)(x, labels=x).backward()
    assert len(seen) >= 2
    for planned, found in seen:
        assert order.overlaps(found) == order.overlaps(planned)


def test_emitted_code_that_lacks_any_start_or_wait_is_refused(emitted):
    removed = 0
    for planned, found in emitted:
        for place, step in enumerate(found):
            if step.offset is not None:
                removed += 1
                with pytest.raises(EmittedOrderChanged, match=f"host offset {step.offset}"):
                    check_order(planned, [*found[:place], *found[place + 1 :]])
    assert removed >= 8


def test_emitted_code_with_a_wait_before_its_start_is_refused(emitted):
    for planned, found in emitted:
        for start in (s for s in found if s.name in order.STARTS):
            wait = Step(order.STARTS[start.name], start.offset)
            rest = [s for s in found if s != wait]
            place = rest.index(start)
            with pytest.raises(EmittedOrderChanged, match="before its start"):
                check_order(planned, [*rest[:place], wait, *rest[place:]])


def waits_at_once(nodes):
    """What Inductor's reordering for memory does: every wait directly after its start."""
    out = [n for n in nodes if order.transfer_of_node(n) not in ("wait_", "offload_wait")]
    for wait in (n for n in nodes if n not in out):
        needed = {d.name for d in wait.unmet_dependencies}
        (start,) = (n for n in out if order.transfer_of_node(n) in order.STARTS and needed & set(n.get_buffer_names()))
        out.insert(out.index(start) + 1, wait)
    return out


def test_code_without_the_plans_overlap_is_told(monkeypatch, caplog):
    monkeypatch.setattr(inductor, "place_transfers", lambda planned: waits_at_once)
    with caplog.at_level("INFO", logger="memo_compile"):
        torch.compile(Chain(4), backend="memo", options=ALL)(torch.randn(1024, 32))
    assert any("nothing overlaps" in r.getMessage() for r in caplog.records)


def test_planned_steps_name_transfers_by_their_host_offset():
    from memo_compile.runtime.ops import register

    register()
    graph = torch.fx.Graph()
    x, lease = graph.placeholder("x"), graph.placeholder("lease")
    graph.call_function(torch.ops.memo.offload.default, (x, lease, 64))
    graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.call_function(torch.ops.aten.mm.default, (x, x))
    graph.output(())
    assert planned_steps(torch.fx.GraphModule({}, graph)) == [Step("offload", 64), Step("mm_default")]
