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
    model, x = zoo.make("gpt-dropout"), zoo.batch(1)
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
    ],
    ids=["output", "gradient", "count", "nan"],
)
def test_a_difference_is_found(wrong):
    with pytest.raises(VerificationFailed, match="unplanned"):
        compare(wrong, right, [torch.randn(5, requires_grad=True)])


def test_rounding_is_not_a_difference():
    compare(lambda x: (x.sin() * (1 + 1e-7),), right, [torch.randn(5, requires_grad=True)])
