"""What happens frame by frame: which are refused at Dynamo's limit, and what small ones do to a budget."""

import functools
import logging

import pytest
import torch
from torch import nn

import memo_compile
from memo_compile.errors import BudgetTooSmall, RecompileLimit
from memo_compile.trace import frames

LENGTHS = (64, 80, 72, 96, 88)


class Rows(nn.Module):
    """Two blocks over rows, with activations of 64 KiB at 64 rows."""

    def __init__(self, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(layers)).double()

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x)) + x
        return x.square().mean()


class WithLog(nn.Module):
    """A graph break leaves a graph of a few bytes: logging, hooks, what a library puts around a model."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = Rows(), nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        loss = self.inner(x)
        torch._dynamo.graph_break()
        return loss * self.scale


def rows(n):
    return torch.randn(n, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def compiled(model, backend="memo_eager", **options):
    model.compile(backend=backend, options=options)
    return model


@pytest.fixture(autouse=True)
def _low_limit():
    with torch._dynamo.config.patch(recompile_limit=3):
        yield


def test_evaluation_at_many_lengths_is_never_refused():
    model = compiled(Rows(), memory_budget="min")
    model(rows(64)).backward()
    with torch.no_grad():
        for n in LENGTHS:
            torch.testing.assert_close(model(rows(n)), Rows()(rows(n)))


@pytest.mark.parametrize("backend", ["memo_eager", "memo"])
def test_training_without_a_budget_is_compiled_once_for_all_lengths(backend):
    model = compiled(Rows(), backend)
    for n in LENGTHS:
        model.zero_grad()
        model(rows(n)).backward()
        reference = Rows()
        reference(rows(n)).backward()
        for got, want in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-14)
    assert len(memo_compile.plans()) == 1  # of the first length; the second compilation is Inductor's


def test_what_is_planned_is_refused_at_the_limit():
    model = compiled(Rows(), offload="all", lengths="exact")
    for n in LENGTHS[:2]:
        model(rows(n)).backward()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        model(rows(LENGTHS[2]))
    assert isinstance(caught.value.inner_exception, RecompileLimit)
    assert "Rows.forward" in str(caught.value.inner_exception)
    assert "Write torch._dynamo.config.recompile_limit" in str(caught.value.inner_exception)
    assert "size mismatch at index 0. expected 80, actual 72" in str(caught.value.inner_exception)


def test_a_frame_of_torchs_own_goes_by_the_modules_forward():
    """Hooks, and what libraries put around a call, make `Module._call_impl` the frame that is compiled."""
    model = torch.nn.Sequential(Rows())
    assert "Sequential.forward" in frames._in_words(nn.Module._call_impl.__code__, {"self": model})
    assert "test_frames.py" in frames._in_words(nn.Module._call_impl.__code__, {"self": Rows()})


def test_a_decorated_forward_goes_by_what_was_decorated():
    """Libraries decorate forwards; the frame is then the outermost decorator's, in a file that tells users nothing."""

    def decorated(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    def forward(x):
        return x

    twice = decorated(decorated(forward))
    assert frames._decorated(twice, twice.__code__) is forward.__code__
    assert frames._decorated(twice, decorated.__code__) is None


@pytest.mark.parametrize("budget", [0.5, "min", 64 * 2**20])
def test_a_graph_of_a_few_bytes_is_in_no_budgets_way(budget):
    model = compiled(WithLog(), memory_budget=budget)
    model(rows(1024)).backward()
    assert len(memo_compile.plans()) == 2


def test_a_share_that_cannot_be_given_is_said_with_the_function_and_numbers(caplog):
    with caplog.at_level(logging.WARNING, logger="memo_compile"):
        compiled(Rows(), memory_budget=0.01)(rows(1024)).backward()
    (line,) = (r.getMessage() for r in caplog.records if "asks this graph" in r.getMessage())
    assert "Rows.forward" in line
    assert "test_frames.py" in line


def test_a_budget_in_bytes_is_for_what_all_graphs_hold_together():
    """The second of two models is refused where both together do not fit, though each alone would."""
    alone = compiled(Rows(3), memory_budget=1.0)
    alone(rows(1024)).backward()
    budget = int(1.2 * memo_compile.plans()[-1].unplanned_peak)
    options = {"memory_budget": budget, "offload": False, "recompute": False, "tiles": 1}
    first, second = compiled(Rows(2), **options), compiled(Rows(3), **options)
    torch._dynamo.reset()
    held = first(rows(1024))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        second(rows(1024))
    refusal = caught.value.inner_exception
    assert isinstance(refusal, BudgetTooSmall)
    assert refusal.budget + refusal.beside == budget
    assert "other graphs" in str(refusal)
    held.backward()
    second(rows(1024)).backward()
