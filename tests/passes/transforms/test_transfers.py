"""Transfers in a graph: where they start, where they land, where they are waited for."""

import pytest
import torch
from torch import fx

from memo_compile.models import GPT, GPTConfig
from memo_compile.passes.fx.build import call
from memo_compile.passes.transforms.offloads import schedule_offloads
from memo_compile.passes.transforms.prefetches import schedule_prefetches
from memo_compile.passes.transforms.slices import fetch
from memo_compile.planning.decide import carry_out, decide
from memo_compile.planning.simulate import simulate
from memo_compile.runtime.ops import register
from memo_compile.trace.offline import trace
from memo_compile.trace.setting import limits_for

register()
memo = torch.ops.memo


@pytest.fixture
def mode():
    return torch._subclasses.FakeTensorMode()


def tensor(mode, *shape):
    with mode:
        return torch.empty(*shape)


def placeholder(graph, name, value):
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def names(gm):
    return [str(n.target).split(".")[1] if n.op == "call_function" else n.op for n in gm.graph.nodes]


def forward_of(mode, works=4):
    """x is offloaded, and then a chain of `works` matmuls runs, each of one second."""
    graph = fx.Graph()
    x, lease = placeholder(graph, "x", tensor(mode, 8, 8)), placeholder(graph, "lease", tensor(mode, 256))
    value = call(graph, torch.ops.aten.sin.default, (x,))
    call(graph, memo.offload.default, (value, lease, 0))
    step = call(graph, torch.ops.aten.mm.default, (value, value))
    call(graph, memo.offload_wait.default, (value, lease, 0))
    for _ in range(works - 1):
        step = call(graph, torch.ops.aten.mm.default, (step, step))
    graph.output((step,))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(("seconds", "matmuls_before_wait"), [(0.5, 1), (1.5, 2), (2.5, 3), (99, 4)])
def test_a_wait_stands_where_its_copy_has_ended(mode, seconds, matmuls_before_wait):
    gm = forward_of(mode)
    schedule_offloads(gm, lambda n: float(n.target is torch.ops.aten.mm.default), rate=256 / seconds)
    order = names(gm)
    assert order[: order.index("offload_wait")].count("mm") == matmuls_before_wait


def backward_of(mode, parts, works=3, written_over=False):
    """`works` matmuls of a second each, then one value is read, joined from `parts` rows of a fetch and others.

    `written_over`: what the rows are made of gives way to another value before they are joined.
    """
    graph = fx.Graph()
    g, lease = placeholder(graph, "g", tensor(mode, 8, 8)), placeholder(graph, "lease", tensor(mode, 256))
    kept = placeholder(graph, "kept", tensor(mode, 2, 8))
    step = g
    for _ in range(works):
        step = call(graph, torch.ops.aten.mm.default, (step, step))
    mark = graph.call_function(fetch, (lease, 0, (parts, 8), torch.float32))
    mark.meta["val"] = tensor(mode, parts, 8)
    value = mark
    if parts < 8:
        rows = call(graph, torch.ops.aten.slice.Tensor, (g, 0, 0, 6 - parts))
        rows = call(graph, torch.ops.aten.mul.Tensor, (rows, 1)) if written_over else rows
        recomputed = call(graph, torch.ops.aten.mm.default, (rows, g))
        if written_over:
            place = call(graph, memo.onto.default, (rows, [6 - parts, 8], [8, 1]))
            call(graph, torch.ops.aten.copy_.default, (place, call(graph, torch.ops.aten.neg.default, (place,))))
        value = call(graph, torch.ops.aten.cat.default, ([mark, recomputed, kept], 0))
    result = call(graph, torch.ops.aten.mm.default, (value, step))
    graph.output((result,))
    return fx.GraphModule({}, graph)


def test_a_prefetch_starts_as_early_as_the_link_needs(mode):
    for seconds, matmuls_before in ((0.5, 2), (1.5, 1), (99, 0)):
        gm = backward_of(mode, 8)
        schedule_prefetches(gm, lambda n: float(n.target is torch.ops.aten.mm.default), rate=256 / seconds)
        order = names(gm)
        assert order[: order.index("prefetch_")].count("mm") == matmuls_before
        assert order[: order.index("wait_")].count("mm") == 3


def matmuls_before(gm, name):
    order = names(gm)
    return order[: order.index(name)].count("mm")


def of_a_matmul(node):
    return float(node.target is torch.ops.aten.mm.default)


def live_of(gm, full):
    """1 KiB at the most, at the nodes in `full` and at the last; nothing elsewhere."""
    nodes = list(gm.graph.nodes)
    return [1024 if i in full or i == len(nodes) - 1 else 0 for i in range(len(nodes))]


def test_a_prefetch_starts_earlier_than_the_link_needs_where_memory_has_room(mode):
    gm = backward_of(mode, 8)
    schedule_prefetches(gm, of_a_matmul, rate=512, live=live_of(gm, ()))
    assert matmuls_before(gm, "prefetch_") == 1  # 2 without slack


def test_a_prefetch_does_not_start_earlier_where_that_would_raise_the_peak(mode):
    gm = backward_of(mode, 8)
    second = [n.target for n in gm.graph.nodes].index(torch.ops.aten.mm.default) + 1
    schedule_prefetches(gm, of_a_matmul, rate=512, live=live_of(gm, (second,)))
    assert matmuls_before(gm, "prefetch_") == 2


def test_room_that_one_prefetch_takes_is_not_there_for_the_next(mode):
    """Three fetches of 256 bytes, all needed after the matmuls, with room for two: two start ahead of the last."""
    graph = fx.Graph()
    g, lease = placeholder(graph, "g", tensor(mode, 8, 8)), placeholder(graph, "lease", tensor(mode, 768))
    step = call(graph, torch.ops.aten.mm.default, (call(graph, torch.ops.aten.mm.default, (g, g)), g))
    marks = [graph.call_function(fetch, (lease, 256 * i, (8, 8), torch.float32)) for i in range(3)]
    for mark in marks:
        mark.meta["val"] = tensor(mode, 8, 8)
    for mark in marks:
        step = call(graph, torch.ops.aten.sub.Tensor, (step, mark))
    graph.output((step,))
    gm = fx.GraphModule({}, graph)
    live = [1024 if n.op == "output" else 256 for n in gm.graph.nodes]
    schedule_prefetches(gm, of_a_matmul, rate=float("inf"), live=live)
    order = names(gm)
    last_matmul = len(order) - 1 - order[::-1].index("mm")
    starts = [i for i, name in enumerate(order) if name == "prefetch_"]
    assert [i < last_matmul for i in starts] == [True, True, False]


def test_a_wait_comes_later_than_the_link_needs_where_memory_has_room(mode):
    for full, expected in (((), 2), (range(4, 7), 1)):
        gm = forward_of(mode)
        schedule_offloads(gm, of_a_matmul, rate=256 / 0.97, live=live_of(gm, full))
        assert matmuls_before(gm, "offload_wait") == expected


def test_a_slice_lands_in_its_rows_and_nothing_is_copied_again(mode):
    """No join is left: the matmul is written to its rows, the kept rows to theirs, and the wait comes last."""
    gm = schedule_prefetches(backward_of(mode, 4), lambda n: 0.0, rate=1.0)
    order = names(gm)
    assert "cat" not in order
    assert order.index("prefetch_") < order.index("mm_into_") < order.index("copy_") < order.index("wait_")
    landing = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.empty.memory_format)
    for target in (memo.prefetch_.default, memo.wait_.default):
        (node,) = gm.graph.find_nodes(op="call_function", target=target)
        assert node.args[0].args[0] is landing


@pytest.mark.parametrize(("parts", "written_over"), [(4, False), (8, False), (4, True)])
def test_the_value_is_the_same(mode, parts, written_over):
    gm = schedule_prefetches(backward_of(mode, parts, written_over=written_over), lambda n: 0.0, rate=1.0)
    g, there, kept = 0.3 * torch.randn(8, 8), torch.randn(parts, 8), torch.randn(2, 8)
    lease = torch.empty(256, dtype=torch.uint8)
    lease[: parts * 32].view(torch.float32).view(parts, 8).copy_(there)
    (got,) = gm(g, lease, kept)
    value = there if parts == 8 else torch.cat([there, g[:2] @ g, kept])
    torch.testing.assert_close(got, value @ torch.linalg.matrix_power(g, 8), rtol=1e-3, atol=1e-3)


def test_prefetches_that_start_together_start_in_the_order_in_which_they_are_needed(mode):
    graph = fx.Graph()
    g, lease = placeholder(graph, "g", tensor(mode, 8, 8)), placeholder(graph, "lease", tensor(mode, 768))
    step = g
    for i in range(3):
        mark = graph.call_function(fetch, (lease, 256 * i, (8, 8), torch.float32))
        mark.meta["val"] = tensor(mode, 8, 8)
        step = call(graph, torch.ops.aten.mm.default, (step, mark))
    graph.output((step,))
    gm = schedule_prefetches(fx.GraphModule({}, graph), lambda n: 0.0, rate=1.0)
    started = [n.args[2] for n in gm.graph.find_nodes(op="call_function", target=memo.prefetch_.default)]
    assert started == [0, 256, 512]


def played(gm, seconds, rate):
    """Seconds that a clock stands still at waits, and that copies take, one by one each way at `rate` bytes/s."""
    clock = free = waited = copied = 0.0
    ends = {}
    for node in gm.graph.nodes:
        if node.target in (memo.offload.default, memo.prefetch_.default):
            rows = node.args[0].meta["val"]
            copy = rows.numel() * rows.element_size() / rate
            ends[node.args[2]] = free = max(clock, free) + copy
            copied += copy
        elif node.target in (memo.offload_wait.default, memo.wait_.default):
            wait = max(0.0, ends[node.args[2]] - clock)
            clock, waited = clock + wait, waited + wait
        elif node.op == "call_function":
            clock += seconds.get(node.name, 0.0)
    return waited, copied


def test_a_model_waits_for_no_copy_where_its_plan_predicts_no_stall():
    """Both graphs of a GPT on the clock of their own costs. Prefetches without room to overlap in are waited for."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(GPTConfig(vocab=512, layers=2, width=64, tokens=512))
        x = torch.randint(0, 512, (1, 512))
    p, setting = trace(model, (x,), {"labels": x}, {"memory_budget": 0.6, "recompute": False})
    decided = decide(p, limits_for(setting, p.unplanned_peak), name="gpt", backend="memo")
    residency = decided.residency
    assert sum(simulate(decided.problem, residency).stalls.values()) == 0
    for graph, rate in ((decided.forward, p.profile.d2h), (decided.backward, p.profile.h2d)):
        waited, copied = played(graph, p.seconds, rate)
        assert waited <= 0.05 * copied
    tight = carry_out(p, decided.residency, overlap=False, host_budget=-1)
    waited, copied = played(tight.backward, p.seconds, p.profile.h2d)
    assert waited > 0.5 * copied > 0
