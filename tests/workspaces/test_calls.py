"""What kernels of torch's own take for themselves, by one call on operands that are made up."""

import pytest
import torch

from memo_compile import measure_peak
from memo_compile.workspaces.calls import by_call

ATEN = torch.ops.aten
DOUBLE = torch.float64


def node_of(op, *args):
    graph = torch.fx.Graph()

    def operand(value):
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    return graph.call_function(op, tuple(operand(a) for a in args))


def convolution(dims):
    image, weight = torch.randn(2, 8, *[12] * dims, dtype=DOUBLE), torch.randn(8, 8, *[3] * dims, dtype=DOUBLE)
    return ATEN.convolution.default, (image, weight, None, [1] * dims, [1] * dims, [1] * dims, False, [0] * dims, 1)


CALLS = {
    "conv2d": convolution(2),
    "conv3d": convolution(3),
    "inverse": (ATEN.linalg_inv_ex.default, (torch.eye(64, dtype=DOUBLE),)),
    "svd": (ATEN._linalg_svd.default, (torch.randn(32, 64),)),
    "sort": (ATEN.sort.default, (torch.randn(64, 512), 0)),
    "scan": (ATEN.cumsum.default, (torch.randn(512, 64).t(), 0)),
    "indices": (ATEN.index_add.default, (torch.randn(64, 64), 0, torch.arange(32), torch.randn(32, 64))),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_takes_what_it_is_measured_to_take(name):
    op, args = CALLS[name]
    results = op(*args)
    results = results if isinstance(results, tuple) else (results,)
    held = sum(r.numel() * r.element_size() for r in results)
    assert by_call(node_of(op, *args)) == pytest.approx(measure_peak(op, *args) - held, rel=0.02, abs=64)


def test_convolutions_take_many_times_their_operands():
    op, args = CALLS["conv3d"]
    assert by_call(node_of(op, *args)) > 10 * args[0].numel() * args[0].element_size()


def test_within_a_trace_random_numbers_and_the_trace_are_left_alone():
    node = node_of(ATEN.rrelu_with_noise_functional.default, torch.randn(64), torch.randn(64), 0.1, 0.3, True)
    before = torch.get_rng_state()
    with torch._subclasses.FakeTensorMode():
        assert by_call(node) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_an_op_refuses_is_not_known():
    assert by_call(node_of(ATEN.view.default, torch.randn(4), [3])) is None
