"""Transfers in emitted code stand where the plan has them, whatever is fused."""

import pytest
import torch
from test_contract import check, make, rows

from memo_compile.codegen import compiler, order
from memo_compile.codegen.order import Step, check_order, emitted_steps, planned_steps
from memo_compile.errors import EmittedOrderChanged

ALL = {"offload": "all"}
A, B, C = Step("a"), Step("b"), Step("c")
OUT, OUT_WAIT = Step("offload", 0), Step("offload_wait", 0)
IN, IN_WAIT = Step("prefetch_", 0), Step("wait_", 0)
IN2, IN2_WAIT = Step("prefetch_", 64), Step("wait_", 64)
PLAN = [A, OUT, B, OUT_WAIT, IN, IN2, C, IN_WAIT, IN2_WAIT]


def test_the_plans_own_order_passes():
    check_order(PLAN, PLAN)


def test_computation_that_only_one_side_knows_is_no_matter():
    check_order(PLAN, [Step("fused"), *PLAN])


@pytest.mark.parametrize(
    ("emitted", "said"),
    [
        ([A, OUT, B, OUT_WAIT, IN2, IN, C, IN_WAIT, IN2_WAIT], "host offset 0 where the code has"),
        ([A, OUT, B, IN, IN2, C, IN_WAIT, IN2_WAIT], "offload_wait"),
        ([A, OUT, B, OUT_WAIT, IN2, C, IN_WAIT, IN2_WAIT], "prefetch_"),
        ([A, OUT, OUT_WAIT, B, IN, IN2, C, IN_WAIT, IN2_WAIT], "nothing overlaps"),
        ([A, OUT, B, OUT_WAIT, IN, IN2, IN_WAIT, C, IN2_WAIT], "nothing overlaps"),
        ([A, OUT_WAIT, OUT, B, IN, IN2, C, IN_WAIT, IN2_WAIT], "before its start"),
    ],
    ids=["prefetches swapped", "a wait lost", "a start lost", "no overlap out", "no overlap in", "wait first"],
)
def test_every_change_is_an_error(emitted, said):
    with pytest.raises(EmittedOrderChanged, match=said):
        check_order(PLAN, emitted)


def test_steps_are_read_from_text():
    text = [
        "    # a comment",
        "    with torch.cuda._DeviceGuard(0):",
        "        extern_kernels.mm(x, y, out=buf3)",
        "        torch.ops.memo.offload.default(reinterpret_tensor(buf3, (4,), (1,), 0), buf1, 128)",
        "        cpp_fused_0(buf3)",
    ]
    assert emitted_steps(text, {"buf3": "mm_7"}.get) == [Step("mm_7"), Step("offload", 128)]


@pytest.fixture
def emitted(monkeypatch):
    """What the compiled graphs' texts say, beside their plans: (planned, emitted) for forward and backward."""
    seen = []

    def spy(planned, found):
        seen.append((planned, found))
        check_order(planned, found)

    monkeypatch.setattr(compiler, "check_order", spy)
    return seen


def test_compiled_code_overlaps_where_the_plan_does(emitted):
    model = make()
    torch.compile(model, backend="memo", options=ALL)(rows()).square().mean().backward()
    check(model, rows())
    (_, forward), (_, backward) = emitted
    for steps, start in ((forward, "offload"), (backward, "prefetch_")):
        assert [s.offset for s in steps if s.name == start]
    # The two prefetches of the earlier layers are under way during the product of the last.
    starts = [i for i, s in enumerate(backward) if s.name == "prefetch_"]
    waits = [i for i, s in enumerate(backward) if s.name == "wait_"]
    assert any(s.offset is None for s in backward[starts[-1] : waits[-1]])


class Chain(torch.nn.Module):
    """No residual, so that Inductor folds no product into a sum and every product keeps its name."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


def waits_at_once(nodes):
    """What Inductor's reordering for memory does: every wait directly behind its start."""
    out = [n for n in nodes if order._transfer(n) not in ("wait_", "offload_wait")]
    for wait in (n for n in nodes if n not in out):
        needed = {d.name for d in wait.unmet_dependencies}
        (start,) = (n for n in out if order._transfer(n) in order.STARTS and needed & set(n.get_buffer_names()))
        out.insert(out.index(start) + 1, wait)
    return out


def test_code_without_the_plans_overlap_is_refused(monkeypatch):
    monkeypatch.setattr(compiler, "place_transfers", waits_at_once)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="nothing overlaps"):
        torch.compile(Chain(), backend="memo", options=ALL)(torch.randn(1024, 32))


def test_planned_steps_name_transfers_by_their_host_offset():
    from memo_compile.runtime.ops import register

    register()
    graph = torch.fx.Graph()
    x, lease = graph.placeholder("x"), graph.placeholder("lease")
    graph.call_function(torch.ops.memo.offload.default, (x, lease, 64))
    graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.output(())
    assert planned_steps(torch.fx.GraphModule({}, graph)) == [Step("offload", 64), Step("sin_default")]
