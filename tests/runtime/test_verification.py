"""verify=True compares the first step with the unplanned graph."""

import pytest
import torch
import zoo
from graphs import Chain

from memo_compile.errors import VerificationFailed
from memo_compile.runtime.ops import engine
from memo_compile.runtime.verification import compare


@pytest.mark.parametrize("backend", ["memo_eager", "memo"])
def test_a_right_plan_passes_and_the_step_is_as_without(backend):
    model, x = zoo.one_layer_gpt(dropout=0.1), zoo.batch(1)
    options = {"memory_budget": "min"}
    _, expected = zoo.gradients(model, torch.compile(model, backend=backend, options=options), x)
    torch._dynamo.reset()
    _, got = zoo.gradients(model, torch.compile(model, backend=backend, options={**options, "verify": True}), x)
    assert all(torch.equal(got[n], g) for n, g in expected.items())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("backend", ["memo_eager", "memo"])
def test_slices_that_come_back_wrong_are_found_before_the_first_step(backend, verify, monkeypatch):
    mover = engine(torch.device("cpu"))
    wait = mover.prefetch_wait

    def wrong(tensor, lease, offset):
        wait(tensor, lease, offset)
        tensor.zero_()

    monkeypatch.setattr(mover, "prefetch_wait", wrong)
    torch.manual_seed(0)
    fn = torch.compile(Chain(2), backend=backend, options={"offload": "all", "verify": verify})
    if verify:
        with pytest.raises(VerificationFailed, match="gradients"):
            fn(torch.randn(1024, 32))
    else:
        fn(torch.randn(1024, 32)).sum().backward()


def right(x):
    return (x.sin(),)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (x.sin() + 1e-3,),
        lambda x: (x.sin().detach() + 0 * x,),
        lambda x: (x.sin(), x.cos()),
        lambda x: (x.sin() * float("nan"),),
        lambda x: (x.sin()[None],),
        lambda x: (x.sin().double(),),
        lambda x: (x.detach().sin(),),
    ],
    ids=["output", "gradient", "count", "nan", "shape", "dtype", "no gradient"],
)
def test_a_difference_is_found(wrong):
    with pytest.raises(VerificationFailed, match="unplanned"):
        compare(wrong, right, [torch.randn(5, requires_grad=True)])


def test_rounding_is_not_a_difference():
    compare(lambda x: (x.sin() * (1 + 1e-7),), right, [torch.randn(5, requires_grad=True)])


@pytest.mark.parametrize(
    ("planned", "reference"),
    [((torch.ones(3), None), (torch.ones(3), torch.ones(3))), ((torch.ones(3), 2), (torch.ones(3), 3))],
    ids=["a value that is missing", "a number"],
)
def test_results_that_are_no_tensors_are_compared(planned, reference):
    with pytest.raises(VerificationFailed, match=r"outputs\[1\]"):
        compare(lambda: planned, lambda: reference, [])


def counting(times):
    """A step that counts its calls in a buffer that it is given, and in one of its own."""
    own = torch.zeros(2)

    def run(x, buffer):
        buffer.add_(1)
        own.add_(times)
        return (x.sin(),)

    return run, [own]


@pytest.mark.parametrize("verify", [False, True])
def test_a_graph_that_calls_other_graphs_suggests_it(verify, caplog):
    layer = torch.nn.Linear(8, 8)

    def step(x):
        return torch.cond(x.sum() > 0, lambda x: layer(x).sin(), lambda x: layer(x).cos(), (x,)).sum()

    with caplog.at_level("INFO", logger="memo_compile"):
        torch.compile(step, backend="memo_eager", options={"verify": verify})(torch.randn(4, 8))
        torch.compile(layer, backend="memo_eager")(torch.randn(4, 8))
    said = [r.getMessage() for r in caplog.records if "verify" in r.getMessage()]
    assert len(said) == (0 if verify else 1)
    assert all("cond" in line for line in said)


def test_updated_buffers_are_compared_and_left_as_they_were():
    x, buffer = torch.randn(5, requires_grad=True), torch.zeros(3)
    (once, mine), (again, theirs), (twice, other) = counting(1), counting(1), counting(2)
    compare(once, again, [x, buffer], mine, theirs)
    with pytest.raises(VerificationFailed, match="state"):
        compare(twice, again, [x, buffer], other, theirs)
    assert not any(t.any() for t in (buffer, *mine, *theirs, *other))
    with pytest.raises(VerificationFailed, match=r"inputs\[1\]"):
        compare(once, lambda x, _: (x.sin(),), [x, buffer])
