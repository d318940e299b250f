"""The diff of a pass: nodes added, removed, moved, and why."""

import torch
import torch.fx as fx

from memo_compile.passes.fx.meta import FOR, ROLE, WHY, Role
from memo_compile.passes.fx.provenance import provenance
from memo_compile.report.pass_log import diff, snapshot


def traced():
    def f(x):
        a = x + 1
        b = x * 2
        c = -x
        return (a - b) / c

    return fx.symbolic_trace(f)


def test_nothing_done_is_nothing_said():
    gm = traced()
    assert diff("joint", snapshot(gm), snapshot(gm), "") == (
        "joint: 6 -> 6 nodes: 0 added, 0 removed, 0 moved, 0 with other arguments\n"
    )


def test_an_added_node_says_why_it_is_there():
    gm = traced()
    before = snapshot(gm)
    sub = next(n for n in gm.graph.nodes if n.name == "sub")
    with gm.graph.inserting_after(sub), provenance(gm, "rows [0, 2) go to the host"):
        relu = gm.graph.call_function(torch.relu, (sub,))
    next(n for n in gm.graph.nodes if n.name == "truediv").replace_input_with(sub, relu)
    text = diff("joint", before, snapshot(gm), "")
    assert "1 added, 0 removed, 0 moved, 1 with other arguments" in text
    assert "  + relu = relu(sub)\n      # rows [0, 2) go to the host" in text
    assert "  ~ truediv = truediv(sub, neg)\n    truediv = truediv(relu, neg)" in text


def test_a_moved_node_says_from_where_to_where():
    gm = traced()
    before = snapshot(gm)
    nodes = {n.name: n for n in gm.graph.nodes}
    nodes["neg"].append(nodes["add"])
    text = diff("joint", before, snapshot(gm), "later is enough")
    assert "1 moved" in text
    assert "  > add: from after x to after neg; later is enough" in text


def test_a_removed_node_is_named():
    gm = traced()
    before = snapshot(gm)
    nodes = {n.name: n for n in gm.graph.nodes}
    nodes["truediv"].replace_all_uses_with(nodes["sub"])
    gm.graph.erase_node(nodes["truediv"])
    assert "  - truediv = truediv(sub, neg)" in diff("joint", before, snapshot(gm), "")


def test_inner_words_and_roles_hold_and_words_decide_nothing():
    """What a report tells a tensor by is its role: sentences are free to change."""
    gm = traced()
    sub = next(n for n in gm.graph.nodes if n.name == "sub")
    with gm.graph.inserting_after(sub), provenance(gm, "outer", "sub", Role.PREFETCHED):
        outer = gm.graph.call_function(torch.relu, (sub,))
        with provenance(gm, "inner", role=Role.RECOMPUTED):
            inner = gm.graph.call_function(torch.tanh, (sub,))
    assert (outer.meta[WHY], outer.meta[ROLE]) == ("outer", Role.PREFETCHED)
    assert (inner.meta[WHY], inner.meta[ROLE], inner.meta[FOR]) == ("inner", Role.RECOMPUTED, "sub")
